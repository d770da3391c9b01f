"""Names that foreign files give: of files in their own folder, and of digests. Nothing else may become a path."""

import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


def inner_path(name: str) -> str:
    """A path of plain names below a folder, as it is.

    Raises:
        ValueError: it is empty or absolute, leads out of the folder, or has other characters than letters, digits and
            ._+=-
    """
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts) or PurePosixPath(name).is_absolute():
        raise ValueError(f"{name!r} is not the name of a file in its folder")
    return name


InnerPath = Annotated[str, AfterValidator(inner_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256."""


class FileRecord(TypedDict):
    """How a file was when it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


Files = dict[InnerPath, FileRecord]
"""The files of a folder by their names in it."""
