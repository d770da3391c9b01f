"""Git-LFS pointers: the small texts that a clone without Git LFS has in place of its large files."""

from pathlib import Path

from halo.errors import UserError

_BEGIN = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024
"""Bytes. Git LFS's specification demands less."""


def check_no_pointer(file: Path) -> None:
    """Refuse a pointer, which would be read as a damaged file, or as text.

    Raises:
        UserError: `file` is one.
        OSError: `file` cannot be read.
    """
    if file.stat().st_size < _LONGEST:
        with file.open("rb") as opened:
            if opened.read(len(_BEGIN)) == _BEGIN:
                raise UserError(f"{file} is a Git-LFS pointer, not the file itself: fetch it with git lfs pull")
