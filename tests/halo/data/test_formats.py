"""Text as it is found: what has none is skipped alike in all formats, and what is not text is refused in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halo.data.corpus import cut, read_documents, read_piece
from halo.errors import UserError

LINE = b'{"text": "a"}\n'
GZIP = gzip.compress(LINE, mtime=0)  # it holds no time: a test's name is made of it, alike in every process
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")]
)
"""Strings of which the second is not UTF-8."""


def read(source: Path) -> list[str]:
    """All of a source by pieces, in their order: "" for what has no text."""
    return [text for piece, _ in cut(source, 50) for text in read_piece(piece)]


def refusal(source: Path) -> str:
    """The one line in which a source is refused, however it is read, without the name of its folder."""
    said = []
    for by in (read, lambda source: list(read_documents(source, "train"))):
        with pytest.raises(UserError) as error:
            by(source)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0].replace(f"{source}/", "")


def parquet(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    return file.getvalue()


WHOLE = parquet({"text": [f"document {i}" for i in range(3000)]}, use_dictionary=False)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.parquet", parquet({"text": pa.array(["x", "y", "x", None]).dictionary_encode()}), ["x", "y", "x", ""]),
        ("a.parquet", parquet({"text": pa.array(["x"], pa.large_string())}), ["x"]),
        ("a.parquet", parquet({"text": pa.array(["x"], pa.string_view())}), ["x"]),
        ("a.parquet", parquet({"text": pa.nulls(2)}), ["", ""]),
        ("a.parquet", parquet({"text": ["a", None, None, "", " "]}, row_group_size=1), ["a", "", "", "", ""]),
        ("a.parquet", parquet({"text": pa.array([], pa.string())}), []),
        ("a.jsonl", b'{"text": null}\n\n \t\n{"text": ""}\n{"text": " \\n"}\n' + LINE, ["", "", "", "", "", "a"]),
        ("a.jsonl", b"\xef\xbb\xbf" + LINE, ["a"]),
        ("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}', ["a", "b"]),
        ("a.jsonl", b'{"text": "a\\u0000b"}', ["a\0b"]),
        ("a.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
        ("a.jsonl", '{"text": "a\u2028b"}'.encode(), ["a\u2028b"]),
        ("a.jsonl", b'{"text": "a", "score": NaN}', ["a"]),
        ("A.JSONL", LINE, ["a"]),
        ("a.jsonl", b"", []),
        ("A.TXT", b"\xef\xbb\xbfhi", ["hi"]),
        ("a.txt", b"CHAPTER I\ra\rCHAPTER II\r\nb", ["CHAPTER I\na", "CHAPTER II\nb"]),
        ("a.txt", b"", [""]),
    ],
)
def test_what_is_read(tmp_path: Path, name: str, content: bytes, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == texts
    assert list(read_documents(tmp_path, "train")) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("columns", "options", "line"),
    [
        ({"text": [b"a"]}, {}, 'a.parquet: its column "text" holds binary, not strings'),
        ({"text": [1]}, {}, 'a.parquet: its column "text" holds int64, not strings'),
        ({"text": [["a"]]}, {}, 'a.parquet: its column "text" holds list<element: string>, not strings'),
        ({"text": [{"a": "x"}]}, {}, 'a.parquet: its column "text" holds struct<a: string>, not strings'),
        ({"text": [True]}, {}, 'a.parquet: its column "text" holds bool, not strings'),
        ({"text": pa.array([1, 1]).dictionary_encode()}, {}, 'a.parquet: its column "text" holds int64, not strings'),
        ({"Text": ["a"]}, {}, 'a.parquet has no column "text" (its columns: Text)'),
        ({"data": [{"text": "a"}]}, {}, 'a.parquet has no column "text" (its columns: data)'),
        (
            pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
            {},
            'a.parquet has 2 columns "text" (its columns: text, text)',
        ),
        ({"text": NOT_UTF8}, {}, "a.parquet, row 2: not UTF-8 (invalid start byte)"),
        (
            {"text": pa.chunked_array([["a"] * 3, NOT_UTF8])},
            {"row_group_size": 3},
            "a.parquet, row 5: not UTF-8 (invalid start byte)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_that_are_refused(tmp_path: Path, columns: Any, options: dict[str, Any], line: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(columns, **options))
    assert refusal(tmp_path) == line


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.parquet", b"", "a.parquet cannot be read as Parquet: "),
        ("a.parquet", WHOLE[:-100], "a.parquet cannot be read as Parquet: "),
        ("a.parquet", LINE, "a.parquet cannot be read as Parquet: "),
        ("a.parquet", WHOLE[:4] + b"\xff" * 40 + WHOLE[44:], "a.parquet, row 1 or later: "),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8 (invalid start byte)"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-32"), "a.jsonl, line 1: not UTF-8 "),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "a.jsonl, line 1: not JSON: "),
        ("a.jsonl", LINE * 2 + b'{"text": "\xe9"}', "a.jsonl, line 3: not UTF-8 (invalid continuation byte)"),
        ("a.jsonl", b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', "a.jsonl, line 1: not UTF-8 "),
        ("a.jsonl", LINE + b'{"text": "b', "a.jsonl, line 2: not JSON: Unterminated string starting at column 10"),
        ("a.jsonl", b'{"a": {"text": "a"}}', 'a.jsonl, line 1: not a JSON object with a key "text"'),
        ("a.jsonl", b'[{"text": "a"}]', 'a.jsonl, line 1: not a JSON object with a key "text"'),
        ("a.jsonl", b'{\n  "text": "a"\n}', "a.jsonl, line 1: not JSON: "),
        ("a.jsonl", b'{"text": ["a"]}', 'a.jsonl, line 1: "text" holds a list, not a string'),
        ("a.jsonl", b'{"text": 1.5}', 'a.jsonl, line 1: "text" holds a float, not a string'),
        ("a.jsonl", b"[" * 200_000, "a.jsonl, line 1: not JSON: nested too deep"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not JSON: Exceeds the limit "),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}', "a.jsonl, line 1: not JSON: Extra data at column 15"),
        ("a.jsonl", b'{"text": "a\tb"}', "a.jsonl, line 1: not JSON: Invalid control character at column 12"),
        ("a.jsonl", LINE + b"\0" * 4096, "a.jsonl, line 2: not JSON: Expecting value at column 1"),
        ("a.jsonl", LINE + b"\xef\xbb\xbf" + LINE, "a.jsonl, line 2: not JSON: "),
        ("a.jsonl", b"text\nx\n", "a.jsonl, line 1: not JSON: Expecting value at column 1"),
        ("a.jsonl", WHOLE, "a.jsonl, line 1: not UTF-8 "),
        ("._a.jsonl", b"\0\5\x16\7\0\2\0\0Mac OS X" + b"\xff" * 9, "._a.jsonl, line 1: not UTF-8 "),
        ("a.jsonl", GZIP, "a.jsonl is compressed: unpack it first"),
        ("a.jsonl", GZIP[:20], "a.jsonl is compressed: unpack it first"),
        ("a.jsonl", zipped(), "a.jsonl is compressed: unpack it first"),
        ("a.txt", bz2.compress(LINE), "a.txt is compressed: unpack it first"),
        ("a.txt", lzma.compress(LINE), "a.txt is compressed: unpack it first"),
        ("a.jsonl.gz", GZIP, "a.jsonl.gz is compressed: unpack it first"),
        ("A.TXT.ZST", b"", "A.TXT.ZST is compressed: unpack it first"),
        ("a.txt", "hi".encode("utf-16"), "a.txt, line 1: not UTF-8 (invalid start byte)"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a.txt, line 2: not UTF-8 (invalid continuation byte)"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path)
    assert said.startswith(line)
    assert len(said) < 400


def test_the_line_of_a_later_piece(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", *lines]))
    assert refusal(tmp_path).startswith("a.jsonl, line 51: not JSON")


def test_a_second_shard_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["a"]}))
    (tmp_path / "b.parquet").write_bytes(parquet({"txt": ["a"]}))
    with pytest.raises(UserError, match=r'b.parquet has no column "text"'):
        cut(tmp_path, 50)  # before the first is read


def test_links(tmp_path: Path) -> None:
    """Nothing in a source is passed over without a word."""
    source = tmp_path / "source"
    (source / "a.jsonl").mkdir(parents=True)
    (source / "a.jsonl" / "b.jsonl").write_bytes(LINE)
    os.symlink(source / "a.jsonl" / "b.jsonl", source / "c.jsonl")
    assert read(source) == ["a", "a"]
    os.symlink(tmp_path / "nothing", source / "d.jsonl")
    assert refusal(source) == "d.jsonl is a broken link, or no ordinary file"
    (source / "d.jsonl").unlink()
    os.mkfifo(source / "d.jsonl")
    assert refusal(source) == "d.jsonl is a broken link, or no ordinary file"
    (source / "d.jsonl").unlink()
    (tmp_path / "more").mkdir()
    os.symlink(tmp_path / "more", source / "more")
    assert refusal(source) == "more is a link to a folder, which is not followed: put the folder itself there"
