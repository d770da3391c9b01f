"""The formats of text sources: .txt, .jsonl and .parquet, a document at a time.

A document is a line of .jsonl (key "text"), a row of .parquet (column "text"), or a chapter of a .txt file (the whole
file, if it has no chapter headings). What has no text is no document, in each format: null, "", blanks, a blank line.
What is not text (another type, another encoding, a damaged file) is refused with its file and its line or row.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from halo.errors import UserError, first_line

ROWS = 1024
"""Rows of .parquet that are decoded at a time."""

# A line of its own, such as "CHAPTER XII" or "Chapter 3", with the "VOLUME II" that may precede it.
_CHAPTER = re.compile(r"^(?:volume [ivxlc\d]+\s+)?chapter [ivxlc\d]+$", re.IGNORECASE | re.MULTILINE)

_COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0", ".bz2": b"BZh", ".zip": b"PK\3\4"}
"""What is often around text: suffix -> the first bytes."""


@dataclass(frozen=True)
class Span:
    """A range of a file: of the row groups of .parquet; of the bytes at which lines of .jsonl begin; all of a .txt."""

    path: Path
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    read: Callable[[Span], Iterator[str | None]]
    """The texts of a span, in order, not stripped. None: there is none, where there could be one."""
    cut: Callable[[Path, int], Iterator[tuple[int, int, int]]]
    """The ranges of a file that are never cut further, given the bytes of text in a piece: begin, end, and the bytes of
    text in it."""


def format_of(path: Path) -> Format | None:
    """The format by the suffix, in small or capital letters; None for a file of another type.

    Raises:
        UserError: it is a compressed file of one of the formats.
    """
    if path.suffix.lower() in _COMPRESSED and Path(path.stem).suffix.lower() in FORMATS:
        raise UserError(f"{path} is compressed: unpack it first")
    return FORMATS.get(path.suffix.lower())


def read_span(span: Span) -> Iterator[str]:
    """The documents of a span, stripped. An empty one stands for a line, row or chapter without text.

    Raises:
        UserError: the file cannot be read, or is not what its suffix says, or something in it is not text.
    """
    form = format_of(span.path)
    assert form is not None
    try:
        for text in form.read(span):
            yield (text or "").strip()
    except OSError as error:
        raise UserError(f"{span.path} cannot be read: {error.strerror or error}") from error


def _read_txt(span: Span) -> Iterator[str]:
    content = span.path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(_not_text(span.path, f"line {line}", f"not UTF-8 ({error.reason})")) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # The text before the first chapter heading (title, author) belongs to the first chapter.
    starts = [match.start() for match in _CHAPTER.finditer(text)][1:]
    for begin, end in zip([0, *starts], [*starts, len(text)], strict=True):
        yield text[begin:end]


def _cut_txt(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    yield 0, 1, path.stat().st_size


def _read_jsonl(span: Span) -> Iterator[str | None]:
    with span.path.open("rb") as lines:
        if span.begin:
            lines.seek(span.begin - 1)
            lines.readline()  # a line that begins before this span belongs to the span before
        while span.end is None or lines.tell() < span.end:
            begin = lines.tell()
            if not (line := lines.readline()):
                return
            try:
                yield _text_in(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line)
            except (ValueError, RecursionError) as error:
                raise UserError(_not_text(span.path, _line_at(span.path, begin), _why(error))) from error


def _text_in(line: bytes) -> str | None:
    """The text of a line of .jsonl; None where it has none.

    Raises:
        ValueError, RecursionError: the line is something else.
    """
    decoded = line.decode()  # json would guess the encoding
    if not decoded.strip():
        return None
    document = json.loads(decoded)
    if not isinstance(document, dict) or "text" not in document:
        raise UserError('not a JSON object with a key "text"')
    text = document["text"]
    if text is not None and not isinstance(text, str):
        raise UserError(f'"text" holds a {type(text).__name__}, not a string')
    if text is not None:
        text.encode()
    return text


def _why(error: Exception) -> str:
    match error:
        case UserError():
            return str(error)
        case UnicodeDecodeError():
            return f"not UTF-8 ({error.reason})"
        case UnicodeEncodeError():
            return f'"text" is not Unicode: {error.reason}'
        case RecursionError():
            return "not JSON: nested too deep"
        case json.JSONDecodeError():
            return f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}"
        case _:
            return f"not JSON: {first_line(error)}"


def _line_at(path: Path, begin: int) -> str:
    """The number of the line that begins at a byte."""
    count, left = 1, begin
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 24))):
            count += block.count(b"\n")
            left -= len(block)
    return f"line {count}"


def _not_text(path: Path, where: str, why: str) -> str:
    """The line that refuses a file of text."""
    with path.open("rb") as file:
        begin = file.read(8)
    if any(begin.startswith(first) for first in _COMPRESSED.values()):
        return f"{path} is compressed: unpack it first"
    return f"{path}, {where}: {why}"


def _cut_jsonl(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    total = path.stat().st_size
    for begin in range(0, total, size):
        end = min(begin + size, total)
        yield begin, end, end - begin


def _read_parquet(span: Span) -> Iterator[str | None]:
    with _parquet(span.path) as file:
        end = file.num_row_groups if span.end is None else span.end
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.begin)) + 1
        batches = file.iter_batches(ROWS, row_groups=[*range(span.begin, end)], columns=["text"], use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{span.path}, row {row} or later: {_brief(error)}") from error
            if batch is None:
                return
            yield from _texts_of(batch.column(0), span.path, row)
            row += len(batch)


def _texts_of(column: pa.Array, path: Path, row: int) -> list[str | None]:
    """The texts of a column, whose first row is row `row` of the file, from 1."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, row):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, row {number}: not UTF-8 ({error.reason})") from error
        raise


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A file with a column "text" of strings. Its errors beyond its footer are the caller's."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {_brief(error)}") from error
    with file:
        columns = file.schema_arrow
        if (count := columns.names.count("text")) != 1:
            has = f"has {count} columns" if count else "has no column"
            raise UserError(f'{path} {has} "text" (its columns: {", ".join(columns.names)})')
        kind = columns.field("text").type
        words = kind.value_type if pa.types.is_dictionary(kind) else kind
        checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(check(words) for check in checks):
            raise UserError(f'{path}: its column "text" holds {_brief(kind)}, not strings')
        yield file


def _brief(said: object) -> str:
    """The first line of what Arrow says, which may be long."""
    return str(said).strip().partition("\n")[0][:300]


def _cut_parquet(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    with _parquet(path) as file:
        (column,) = (i for i in range(file.metadata.num_columns) if file.metadata.schema.column(i).path == "text")
        for group in range(file.num_row_groups):
            yield group, group + 1, file.metadata.row_group(group).column(column).total_uncompressed_size


FORMATS = {
    ".txt": Format(read=_read_txt, cut=_cut_txt),
    ".jsonl": Format(read=_read_jsonl, cut=_cut_jsonl),
    ".parquet": Format(read=_read_parquet, cut=_cut_parquet),
}
"""The formats by suffix."""
