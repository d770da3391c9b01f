"""Text sources: folders or files of .txt, .jsonl and .parquet, read one document at a time.

Every tenth document of a source is held out, so that nothing is ever trained on what it is evaluated on. A document is
a line of .jsonl (key "text"), a row of .parquet (column "text"), or a chapter of a .txt file (all of it, if it has no
chapter headings).
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from halo.errors import UserError

Part = Literal["train", "held_out"]

HELD_OUT_EVERY = 10

# A line of its own, such as "CHAPTER XII" or "Chapter 3", with the "VOLUME II" that may stand above it.
_CHAPTER = re.compile(r"^(?:volume [ivxlc\d]+\s+)?chapter [ivxlc\d]+$", re.IGNORECASE | re.MULTILINE)


def read_documents(source: str | Path, part: Part) -> Iterator[str]:
    """The documents of one part of `source`: a file, or a folder whose files are read in the order of their paths.

    Empty documents are left out and not counted.

    Raises:
        UserError: nothing to read at `source`, or a file in it is not what its suffix says.
    """
    count = 0
    for path in _files(Path(source)):
        for document in _READERS[path.suffix](path):
            text = document.strip()
            if text:
                count += 1
                if (count % HELD_OUT_EVERY == 0) == (part == "held_out"):
                    yield text


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"text source {source} does not exist")
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    readable = [path for path in found if path.suffix in _READERS]
    if not readable:
        raise UserError(f"text source {source} holds no file of type {', '.join(_READERS)}")
    return readable


def _read_txt(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    # What stands before the first chapter (title, author) belongs to it.
    starts = [match.start() for match in _CHAPTER.finditer(text)][1:]
    for begin, end in zip([0, *starts], [*starts, len(text)], strict=True):
        yield text[begin:end]


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}, line {number}: no JSON object with a key "text"') from error
            if not isinstance(text, str):
                raise UserError(f'{path}, line {number}: "text" is not a string')
            yield text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'{path} has no column "text" (its columns: {", ".join(file.schema_arrow.names)})')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
