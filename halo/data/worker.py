"""A worker process of halo/data/preparation.py: it tokenizes, packs and writes one piece of text at a time."""

import ctypes
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from halo.data.corpus import Piece, read_piece
from halo.data.packing import HELD_OUT, TEXTS_PER_CALL, Packing, cut_samples, join_documents
from halo.data.shards import write_samples
from halo.names import Digest, InnerPath
from halo.run import atomic, sha256


class PartRecord(TypedDict):
    """What a piece became for a stage."""

    documents: int
    tokens: int
    samples: int
    shards: list[Any]
    """Entries of an MDS index."""
    rest: list[int]
    """The tokens left over, fewer than a sample."""


class HeldOutRecord(TypedDict):
    """What a piece became as held-out text."""

    documents: int
    sha256: dict[InnerPath, Digest]


WORK = "preparation"
"""The subfolder for files that are needed only until a preparation is complete."""


def worker_pool(workers: int, folder: Path, tokenizer: Tokenizer, packing: Packing) -> ProcessPoolExecutor:
    """Processes for `write_in_worker`. They are forked: so a worker has the tokenizer and the libraries at once."""
    context = multiprocessing.get_context("fork")
    job = (os.getpid(), folder, tokenizer, packing)
    return ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=job)


_job: tuple[ThreadPoolExecutor, Path, Tokenizer, Packing]


def _start_worker(parent: int, folder: Path, tokenizer: Tokenizer, packing: Packing) -> None:
    """Set up a worker that ends when its parent ends, even if the parent is killed.

    It works in a second thread: in the first thread of a process the tokenizer needs half as much time again
    (docs/benchmarks.md), perhaps because glibc's malloc uses another arena there.
    """
    global _job
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    _job = ThreadPoolExecutor(1), folder, tokenizer, packing


def write_in_worker(number: int, piece: Piece) -> None:
    """`write_piece`, in a process of `worker_pool`."""
    thread, folder, tokenizer, packing = _job
    thread.submit(write_piece, folder, number, piece, tokenizer, packing).result()


def record_path(folder: Path, number: int) -> Path:
    """The file that says what a piece became. It exists once the piece is written."""
    return folder / WORK / f"{number:06}.json"


def write_piece(folder: Path, number: int, piece: Piece, tokenizer: Tokenizer, packing: Packing) -> None:
    """Write a piece's samples for each part, and last its record. Each file is complete when it appears.

    The record has a PartRecord for each stage, a HeldOutRecord, and `skipped`: how many documents have no text.
    """
    texts: dict[str, list[str]] = {name: [] for name in (HELD_OUT, *packing.parts)}
    skipped = 0
    for text in read_piece(piece):
        if text:
            texts[packing.part_of(text)].append(text)
        else:
            skipped += 1
    record: dict[str, Any] = {"skipped": skipped, HELD_OUT: _write_text(folder, number, texts.pop(HELD_OUT))}
    for name, documents in texts.items():
        random.Random(f"{packing.seed} {number}").shuffle(documents)
        tokens = join_documents(_encode(documents, tokenizer), packing.separator, np.dtype(packing.dtype))
        samples, rest = cut_samples(tokens, packing.parts[name].seq_len)
        record[name] = {
            "documents": len(documents),
            "tokens": len(tokens),
            "samples": len(samples),
            "shards": write_samples(folder / name, f"{number:06}", samples, packing.compression),
            "rest": rest.tolist(),
        }
    with atomic(record_path(folder, number)) as partial:
        partial.write_text(json.dumps(record))


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Each text's token ids. A special token that is written out in a text is encoded as plain text."""
    for begin in range(0, len(texts), TEXTS_PER_CALL):
        together = texts[begin : begin + TEXTS_PER_CALL]
        yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(together, add_special_tokens=False))


def _write_text(folder: Path, number: int, texts: list[str]) -> dict[str, Any]:
    if not texts:
        return {"documents": 0, "sha256": {}}
    path = folder / HELD_OUT / f"{number:06}.parquet"
    with atomic(path) as partial:
        pq.write_table(pa.table({"text": texts}), partial, compression="zstd")
        digest = sha256(partial)
    return {"documents": len(texts), "sha256": {path.name: digest}}
