"""Text sources: folders or files of .txt, .jsonl and .parquet, read one document at a time.

Every tenth document of a source is held out: no model is evaluated on text that it was trained on. A folder that
halo/data/preparation.py wrote as held out is held out as a whole. What a document is: halo/data/formats.py.

    for document in read_documents(source, "train"): ...
    for piece, size in cut(source, 1 << 25): ...  # about 32 MiB of text each, for many processes to read in parallel
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from halo.data.formats import FORMATS, Span, format_of, read_span
from halo.errors import UserError
from halo.pointers import check_no_pointer
from halo.run import content_digest

TextSplit = Literal["train", "held_out"]

HELD_OUT_EVERY = 10
HELD_OUT_MARK = "held_out.json"
"""A folder with this file is held out as a whole."""


def read_documents(source: str | Path, split: TextSplit) -> Iterator[str]:
    """The documents of one split of `source`: a file, or a folder whose files are read in the order of their paths.

    Empty documents are skipped and not counted.

    Raises:
        UserError: as `text_files` and `read_span`.
    """
    source, count = Path(source), 0
    all_held_out = (source / HELD_OUT_MARK).is_file()
    for path in text_files(source):
        for text in filter(None, read_span(Span(path))):
            count += 1
            if (all_held_out or count % HELD_OUT_EVERY == 0) == (split == "held_out"):
                yield text


Piece = list[Span]
"""The text that one process reads at a time."""


def cut(source: Path, size: int) -> list[tuple[Piece, int]]:
    """The source in pieces, each with its number of bytes: at least `size` bytes of text, but for the last piece.

    For .parquet, the uncompressed size of the text column counts. A row group, a .txt file, and `size` bytes of .jsonl
    are never cut.

    Raises:
        UserError: as `text_files`, or a .parquet file is damaged or has no column "text" of strings.
    """
    pieces: list[tuple[Piece, int]] = []
    piece: Piece = []
    total = 0
    for path in text_files(source):
        form = format_of(path)
        assert form is not None
        for begin, end, count in form.cut(path, size):
            piece.append(Span(path, begin, end))
            total += count
            if total >= size:
                pieces.append((piece, total))
                piece, total = [], 0
    return [*pieces, (piece, total)] if piece else pieces


def read_piece(piece: Piece) -> Iterator[str]:
    """The documents of a piece, stripped. An empty one stands for a line, row or chapter without text.

    Raises:
        UserError: as `read_span`.
    """
    for span in piece:
        yield from read_span(span)


def text_digest(source: str | Path) -> str:
    """A digest of a text source: of its files' names and all that is in them, and of which split it is.

    Raises:
        UserError: as `text_files`.
    """
    source = Path(source)
    files = {path.relative_to(source).as_posix(): path for path in text_files(source)}
    return content_digest(files, HELD_OUT_MARK if (source / HELD_OUT_MARK).is_file() else "")


def text_files(source: Path) -> list[Path]:
    """The files of a text source that can be read, sorted by path.

    Raises:
        UserError: there are none, or one of the files or folders there would be passed over, or is a Git-LFS pointer.
    """
    if not source.exists():
        raise UserError(f"text source {source} does not exist")
    readable = []
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.is_dir():
            if path.is_symlink():
                raise UserError(f"{path} is a link to a folder, which is not followed: put the folder itself there")
        elif format_of(path) is not None:
            if not path.is_file():
                raise UserError(f"{path} is a broken link, or no ordinary file")
            check_no_pointer(path)
            readable.append(path)
    if not readable:
        raise UserError(f"text source {source} holds no file of type {', '.join(FORMATS)}")
    return readable
