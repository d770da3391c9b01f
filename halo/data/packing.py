"""One piece of text, tokenized and packed: what a worker process of halo/data/preparation.py does.

A document's part is decided by its text and the seed alone, so that no two parts share one, not even where the source
has it twice. What a piece leaves over of a part, less than a sample, goes into its record.
"""

import json
import random
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from streaming import MDSWriter
from tokenizers import Tokenizer

from halo.data.corpus import Piece, read_piece
from halo.data.shards import COLUMN
from halo.run import atomic, atomic_folder, sha256

HELD_OUT = "held_out"
WORK = "preparation"
"""The subfolder for what only a preparation under way needs."""

_TOGETHER = 256
"""Documents that the tokenizer takes at once."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One stage's share of the text."""

    seq_len: int
    tokens: int
    """How many it is to have; with the others', its share of the documents."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """All that decides the bytes which a piece becomes, but for the tokenizer."""

    parts: dict[str, Part]
    held_out: float
    """The share of documents that no part has."""
    seed: int
    separator: int
    """The token after each document."""
    dtype: str
    compression: str
    """"zstd" or "" (none)."""

    def part_of(self, text: str) -> str:
        """The part that a document belongs to."""
        digest = blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return self._names[bisect(self._edges, int.from_bytes(digest, "big") / 2**64)]

    @cached_property
    def _names(self) -> list[str]:
        return [HELD_OUT, *self.parts]

    @cached_property
    def _edges(self) -> list[float]:
        tokens = np.array([part.tokens for part in self.parts.values()], float)
        ends = self.held_out + (1 - self.held_out) * np.cumsum(tokens / tokens.sum())
        return [self.held_out, *ends[:-1].tolist()]


def record_path(folder: Path, number: int) -> Path:
    return folder / WORK / f"{number:06}.json"


def write_piece(folder: Path, number: int, piece: Piece, tokenizer: Tokenizer, packing: Packing) -> dict[str, Any]:
    """Write a piece's samples of each part, and last its record, which it returns. Each appears in one step.

    The record has, for each part: `documents`, `tokens`, `samples`, `shards` (entries of an MDS index), and `rest` (the
    tokens left over); for held-out text: `documents`, and `sha256` (name -> digest).
    """
    texts: dict[str, list[str]] = {name: [] for name in (HELD_OUT, *packing.parts)}
    for text in read_piece(piece):
        texts[packing.part_of(text)].append(text)
    record: dict[str, Any] = {HELD_OUT: _write_text(folder, number, texts.pop(HELD_OUT))}
    for name, documents in texts.items():
        random.Random(f"{packing.seed} {number}").shuffle(documents)
        tokens = tokenize(documents, tokenizer, packing.separator, np.dtype(packing.dtype))
        seq_len = packing.parts[name].seq_len
        samples = tokens[: len(tokens) - len(tokens) % seq_len].reshape(-1, seq_len)
        record[name] = {
            "documents": len(documents),
            "tokens": len(tokens),
            "samples": len(samples),
            "shards": write_samples(folder / name, f"{number:06}", samples, packing.compression),
            "rest": tokens[samples.size :].tolist(),
        }
    with atomic(record_path(folder, number)) as partial:
        partial.write_text(json.dumps(record))
    return record


def tokenize(texts: list[str], tokenizer: Tokenizer, separator: int, dtype: np.dtype) -> np.ndarray:
    """The ids of all texts in a row, the separator after each. Special tokens written out in a text are mere text."""
    ids = []
    for begin in range(0, len(texts), _TOGETHER):
        for encoding in tokenizer.encode_batch_fast(texts[begin : begin + _TOGETHER], add_special_tokens=False):
            ids += [np.array(encoding.ids, dtype), np.array([separator], dtype)]
    return np.concatenate(ids) if ids else np.empty(0, dtype)


def write_samples(folder: Path, name: str, samples: np.ndarray, compression: str) -> list[dict[str, Any]]:
    """Write [N, T] samples as MDS shards to `folder`/`name`; their entries for the index of `folder`."""
    if not len(samples):
        return []
    columns = {COLUMN: f"ndarray:{samples.dtype.name}:{samples.shape[1]}"}
    with atomic_folder(folder / name) as partial:
        with MDSWriter(out=str(partial), columns=columns, compression=compression or None, hashes=["sha256"]) as writer:
            for sample in samples:
                writer.write({COLUMN: sample})
        index = partial / "index.json"
        shards = json.loads(index.read_text())["shards"]
        index.unlink()
    for shard in shards:
        for file in (shard["raw_data"], shard["zip_data"]):
            if file:
                file["basename"] = f"{name}/{file['basename']}"
    return shards


def _write_text(folder: Path, number: int, texts: list[str]) -> dict[str, Any]:
    if not texts:
        return {"documents": 0, "sha256": {}}
    path = folder / HELD_OUT / f"{number:06}.parquet"
    with atomic(path) as partial:
        pq.write_table(pa.table({"text": texts}), partial, compression="zstd")
        digest = sha256(partial)
    return {"documents": len(texts), "sha256": {path.name: digest}}
