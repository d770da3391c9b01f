"""Documents come whole, in order, from every format; what is held out is never in the training part."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halo.data.corpus import HELD_OUT_EVERY, read_documents
from halo.errors import UserError


def _all(source: Path) -> list[str]:
    return sorted([*read_documents(source, "train"), *read_documents(source, "held_out")])


def test_every_tenth_document_is_held_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}", "url": "ignored"}) for i in range(1, 26)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert list(read_documents(tmp_path, "held_out")) == ["document 10", "document 20"]
    assert len(list(read_documents(tmp_path, "train"))) == 23


def test_chapters_are_documents(tmp_path: Path) -> None:
    book = "TITLE\n\nCHAPTER I\n\nOne.\n\nIn chapter two.\n\nVOLUME II\n\nCHAPTER I\n\nTwo.\n\nChapter 3\n\nThree.\n"
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "note.txt").write_text("No chapters here.\n\nTwo paragraphs.")
    assert list(read_documents(tmp_path, "train")) == [
        "TITLE\n\nCHAPTER I\n\nOne.\n\nIn chapter two.",
        "VOLUME II\n\nCHAPTER I\n\nTwo.",
        "Chapter 3\n\nThree.",
        "No chapters here.\n\nTwo paragraphs.",
    ]


def test_parquet_and_nested_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", None, " two "]}), tmp_path / "deep" / "b.parquet")
    (tmp_path / "README.md").write_text("not a document")
    assert list(read_documents(tmp_path, "train")) == ["one", "two"]
    assert list(read_documents(tmp_path / "deep" / "b.parquet", "train")) == ["one", "two"]


def test_the_embedded_corpus_holds_out_chapters_of_every_novel(corpus: Path) -> None:
    train, held_out = list(read_documents(corpus, "train")), list(read_documents(corpus, "held_out"))
    assert len(train) + len(held_out) == 269
    assert len(held_out) == 269 // HELD_OUT_EVERY
    assert not set(train) & set(held_out)
    for novel in sorted(corpus.glob("*.txt")):
        text = novel.read_text(encoding="utf-8")
        assert sum(chapter in text for chapter in held_out) >= 2, novel.name


def test_the_embedded_corpus_is_the_novels_alone(corpus: Path) -> None:
    texts = [novel.read_text(encoding="utf-8").lower() for novel in sorted(corpus.glob("*.txt"))]
    assert len(texts) == 6
    for word in ("gutenberg", "ebook", "copyright", "signet", "\r", "\ufeff"):
        assert not any(word in text for text in texts), word


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "line 2"),
        ("a.jsonl", b'{"body": "x"}\n', 'key "text"'),
        ("a.jsonl", b'["text"]\n', 'key "text"'),
        ("a.jsonl", b'{"text": 3}\n', "holds a int, not a string"),
        ("a.jsonl", b'{"text": "half a \\ud83d"}\n', "not Unicode: surrogates"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.csv", b"text\nx\n", "holds no file of type"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _all(tmp_path)


def test_parquet_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'no column "text" \(its columns: content\)'):
        _all(tmp_path)


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        _all(tmp_path / "none")
