"""Text sources: folders or files of .txt, .jsonl and .parquet, read one document at a time.

Every tenth document of a source is held out: no model is evaluated on text that it was trained on. A folder that
halo/data/preparation.py wrote as held out is held out as a whole. A document is a line of .jsonl (key "text"), a row of
.parquet (column "text"), or a chapter of a .txt file (the whole file, if it has no chapter headings).

    for document in read_documents(source, "train"): ...
    for piece, size in cut(source, 1 << 25): ...  # about 32 MiB of text each, for many processes to read in parallel
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from halo.errors import UserError

TextSplit = Literal["train", "held_out"]

HELD_OUT_EVERY = 10
HELD_OUT_MARK = "held_out.json"
"""A folder with this file is held out as a whole."""

# A line of its own, such as "CHAPTER XII" or "Chapter 3", with the "VOLUME II" that may precede it.
_CHAPTER = re.compile(r"^(?:volume [ivxlc\d]+\s+)?chapter [ivxlc\d]+$", re.IGNORECASE | re.MULTILINE)


def read_documents(source: str | Path, split: TextSplit) -> Iterator[str]:
    """The documents of one split of `source`: a file, or a folder whose files are read in the order of their paths.

    Empty documents are skipped and not counted.

    Raises:
        UserError: there is nothing to read at `source`, or the format of a file is not what its suffix says.
    """
    source, count = Path(source), 0
    all_held_out = (source / HELD_OUT_MARK).is_file()
    for path in text_files(source):
        for text in _read_span(Span(path)):
            count += 1
            if (all_held_out or count % HELD_OUT_EVERY == 0) == (split == "held_out"):
                yield text


@dataclass(frozen=True)
class Span:
    """A range of a file: of the row groups of .parquet; of the bytes at which lines of .jsonl begin; all of a .txt."""

    path: Path
    begin: int = 0
    end: int | None = None


Piece = list[Span]
"""The text that one process reads at a time."""


def cut(source: Path, size: int) -> list[tuple[Piece, int]]:
    """The source in pieces, each with its number of bytes: at least `size` bytes of text, but for the last piece.

    For .parquet, the uncompressed size of the text column counts. A row group, a .txt file, and `size` bytes of .jsonl
    are never cut.

    Raises:
        UserError: there is nothing to read at `source`, or a .parquet file is damaged or has no column "text".
    """
    pieces: list[tuple[Piece, int]] = []
    piece: Piece = []
    total = 0
    for path in text_files(source):
        for begin, end, count in _CUTTERS[path.suffix](path, size):
            piece.append(Span(path, begin, end))
            total += count
            if total >= size:
                pieces.append((piece, total))
                piece, total = [], 0
    return [*pieces, (piece, total)] if piece else pieces


def read_piece(piece: Piece) -> Iterator[str]:
    """The documents of a piece, stripped, without empty ones.

    Raises:
        UserError: the format of a file is not what its suffix says.
    """
    for span in piece:
        yield from _read_span(span)


def _read_span(span: Span) -> Iterator[str]:
    stripped = (document.strip() for document in _READERS[span.path.suffix](span))
    return (text for text in stripped if text)


def text_files(source: Path) -> list[Path]:
    """The files of a text source that can be read, sorted by path.

    Raises:
        UserError: there are none.
    """
    if not source.exists():
        raise UserError(f"text source {source} does not exist")
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    readable = [path for path in found if path.suffix in _READERS]
    if not readable:
        raise UserError(f"text source {source} holds no file of type {', '.join(_READERS)}")
    return readable


def _read_txt(span: Span) -> Iterator[str]:
    try:
        text = span.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{span.path} is not UTF-8 text: {error}") from error
    # The text before the first chapter heading (title, author) belongs to the first chapter.
    starts = [match.start() for match in _CHAPTER.finditer(text)][1:]
    for begin, end in zip([0, *starts], [*starts, len(text)], strict=True):
        yield text[begin:end]


def _read_jsonl(span: Span) -> Iterator[str]:
    with span.path.open("rb") as lines:
        if span.begin:
            lines.seek(span.begin - 1)
            lines.readline()  # a line that begins before this span belongs to the span before
        while span.end is None or lines.tell() < span.end:
            begin = lines.tell()
            if not (line := lines.readline()):
                return
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{_line(span.path, begin)}: no JSON object with a key "text"') from error
            if not isinstance(text, str):
                raise UserError(f'{_line(span.path, begin)}: "text" is not a string')
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f'{_line(span.path, begin)}: "text" is not Unicode: {error.reason}') from error
            yield text


def _line(path: Path, begin: int) -> str:
    """The path, and the number of the line that begins at a byte."""
    with path.open("rb") as file:
        number = file.read(begin).count(b"\n") + 1
    return f"{path}, line {number}"


def _read_parquet(span: Span) -> Iterator[str]:
    with _parquet(span.path) as file:
        groups = range(span.begin, file.num_row_groups if span.end is None else span.end)
        for batch in file.iter_batches(batch_size=1024, columns=["text"], row_groups=list(groups), use_threads=False):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'{path} has no column "text" (its columns: {", ".join(file.schema_arrow.names)})')
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _cut_txt(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    yield 0, 1, path.stat().st_size


def _cut_jsonl(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    total = path.stat().st_size
    for begin in range(0, total, size):
        end = min(begin + size, total)
        yield begin, end, end - begin


def _cut_parquet(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    with _parquet(path) as file:
        (column,) = (i for i in range(file.metadata.num_columns) if file.metadata.schema.column(i).path == "text")
        for group in range(file.num_row_groups):
            yield group, group + 1, file.metadata.row_group(group).column(column).total_uncompressed_size


_READERS: dict[str, Callable[[Span], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_CUTTERS: dict[str, Callable[[Path, int], Iterator[tuple[int, int, int]]]] = {
    ".txt": _cut_txt,
    ".jsonl": _cut_jsonl,
    ".parquet": _cut_parquet,
}
