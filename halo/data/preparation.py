"""From a text source to token shards for every stage, in one pass over it, on many processes and nodes.

    <folder>/plan.json                 what is prepared here, and from what
    <folder>/<stage>/                  MDS shards: <piece>/shard.*.mds, index.json, and manifest.json, written last
    <folder>/held_out/                 text that no stage trains on: <piece>.parquet, and held_out.json, written last
    <folder>/preparation/              locks, and a record of each piece that is written; gone at the end

The source is cut into pieces of one size, in an order that the seed decides. A worker process tokenizes a piece and
packs it into samples for each stage (halo/data/packing.py). As many pieces are taken, from the first on, as all stages
together need; what the pieces leave over is then joined into further samples. So each byte depends on the source, the
tokenizer and the settings, and not on how many processes there were, on how many nodes, or how often one was killed.

Tasks, on other nodes, each take the next piece that nobody has in hand. The last to finish writes the end.
"""

import copy
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from hashlib import sha256 as new_sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import HELD_OUT_MARK, Piece, cut, text_files
from halo.data.locks import Place, exclusive, try_lock
from halo.data.packing import HELD_OUT, WORK, Packing, Part, record_path, write_piece, write_samples
from halo.data.shards import MANIFEST
from halo.errors import UserError
from halo.models.tokenizer import separator_id, tokenizer_hash
from halo.progress import progress_bar
from halo.run import atomic, difference, sha256

PIECE = 1 << 25
"""Bytes of text in a piece: some eight million tokens, half a minute of a core's work."""
HELD_OUT_SHARE = 0.005
"""Of the documents: twelve million of 2.3 billion tokens, more than the stages that measure read."""

PLAN = "plan.json"
LOCK = "plan.lock"
FAR_TOO_SMALL = 0.8
"""Of the tokens asked for: a source that seems to have fewer is refused after its first piece, not at its end."""
INDEX = "index.json"


def prepare(
    source: Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    parts: Mapping[str, Part],
    *,
    seed: int = 0,
    source_name: str | None = None,
    whole: bool = False,
    held_out: float = HELD_OUT_SHARE,
    compression: str = "",
    workers: int,
    task: int = 0,
    tasks: int = 1,
    piece_bytes: int = PIECE,
) -> dict[str, dict[str, Any]] | None:
    """Prepare each part's shards, and the held-out text, in `folder`; go on where an earlier call was ended.

    Args:
        parts: by the names of their folders. Each gets at least its `tokens`, in samples of its `seq_len`.
        source_name: what the manifests call the source, if not its path.
        whole: take all of the source, and not only as much as `parts` need; their `tokens` are then proportions.
        held_out: the share of documents that goes to no part.
        workers: how many processes to tokenize in.
        task, tasks: which share of the work is done here, where other calls do the others.

    Returns:
        The manifests by part, or None where other tasks have not finished.

    Raises:
        UserError: the source is too small or cannot be read, the folder belongs to something else, another process
            works on it, or it cannot be written.
    """
    if not 0 <= task < tasks or workers < 1 or not 0 <= held_out < 1:
        raise UserError(
            f"task {task} of {tasks}, {workers} workers, {held_out} held out: tasks count from 0, workers from 1, and "
            "what is held out is from 0 to below 1"
        )
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    packing = Packing(
        parts=dict(parts),
        held_out=held_out,
        seed=seed,
        separator=separator_id(tokenizer),
        dtype="uint16" if len(tokenizer) <= 2**16 else "uint32",
        compression=compression,
    )
    settings = {
        "source": source_name or str(source),
        "source_files": _fingerprint(source),
        "tokenizer": tokenizer_hash(tokenizer),
        "whole": whole,
        "piece_bytes": piece_bytes,
        "version": version("hypenet-halo"),
        **asdict(packing),
    }
    try:
        return _prepare(_Work(source, backend, folder, packing, settings), folder, settings, workers, task, tasks)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; nothing is lost: once that is mended, the same "
            "command goes on"
        ) from error


def _prepare(
    work: "_Work", folder: Path, settings: Mapping[str, Any], workers: int, task: int, tasks: int
) -> dict[str, dict[str, Any]] | None:
    """This task's share of the work, and, if it is the last to finish, what is written at the end."""
    parts = settings["parts"]
    _claim(folder, settings)
    with exclusive(folder / LOCK):
        if _is_complete(folder, parts):
            shutil.rmtree(folder / WORK, ignore_errors=True)  # a kill may have left some of it
            return _manifests(folder, parts)
        (folder / WORK).mkdir(exist_ok=True)
        place = Place(folder / WORK, task, tasks)
    try:
        work.run(workers)
        with exclusive(folder / LOCK):
            if not (_all_finished(folder, task, tasks) and place.is_alone()):
                place.leave()
                return None
            work.run(workers)  # what a task left that was ended
            work.merge()
            shutil.rmtree(folder / WORK)
            return _manifests(folder, parts)
    finally:
        place.leave()


class _Work:
    """The pieces of a source, and how far they are written."""

    def __init__(self, source: Path, tokenizer: Tokenizer, folder: Path, packing: Packing, settings: Mapping[str, Any]):
        self._tokenizer, self._folder, self._packing, self._settings = tokenizer, folder, packing, settings
        self._whole = settings["whole"]
        pieces = cut(source, settings["piece_bytes"])
        order = np.random.default_rng(packing.seed).permutation(len(pieces))
        self._pieces: list[tuple[Piece, int]] = [pieces[i] for i in order]
        self._bytes = sum(size for _, size in pieces)
        # Of the first pieces, as far as they are written without a gap and needed:
        self._first = 0
        self._first_bytes = 0
        self._tokens = dict.fromkeys(packing.parts, 0)
        self._samples = dict.fromkeys(packing.parts, 0)

    def run(self, workers: int) -> None:
        """Write the first pieces that are not written yet and that no other task has in hand, until they are enough."""
        done: set[int] = set()
        running: dict[Future[None], int] = {}
        enough = self._look()
        bar = progress_bar(self._expected(), "prepare", " tokens", sum(self._tokens.values()), delay=1.0, scale=True)
        with bar, open(self._folder / WORK / "pieces.lock", "a+b") as claims, self._pool(workers) as pool:
            try:
                while not enough:
                    for number in range(self._first, len(self._pieces)):
                        if len(running) > workers:
                            break
                        if number in done or number in running.values():
                            continue
                        if record_path(self._folder, number).is_file():
                            done.add(number)
                        elif try_lock(claims, number, 1):
                            running[pool.submit(_write, number, self._pieces[number][0])] = number
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        done.add(running.pop(future))
                    enough = self._look()
                    bar.total = self._expected()
                    bar.update(sum(self._tokens.values()) - bar.n)
            except BrokenProcessPool as error:
                raise UserError("a worker process was killed, out of memory perhaps: take fewer --workers") from error
            finally:
                pool.shutdown(cancel_futures=True)

    def merge(self) -> None:
        """Write what stands at the end: the joined samples, the indexes, and the manifests.

        Raises:
            UserError: the source has less than the parts need.
        """
        enough = self._look()
        if not (enough or self._whole):
            raise self._too_small(sum(self._tokens.values()))
        records = [self._record(number) for number in range(self._first)]
        for name, part in self._packing.parts.items():
            self._merge_part(name, part, [record[name] for record in records])
        held_out = [record[HELD_OUT] for record in records]
        manifest = {
            **_provenance(self._settings, HELD_OUT),
            "documents": sum(one["documents"] for one in held_out),
            "sha256": {name: digest for one in held_out for name, digest in one["sha256"].items()},
        }
        _write_manifest(self._folder / HELD_OUT, HELD_OUT_MARK, manifest)

    def _merge_part(self, name: str, part: Part, records: Sequence[Mapping[str, Any]]) -> None:
        folder = self._folder / name
        rest = np.concatenate([record["rest"] for record in records])
        joined = rest[: len(rest) - len(rest) % part.seq_len].reshape(-1, part.seq_len)
        shards = [shard for record in records for shard in record["shards"]]
        shards += write_samples(folder, "joined", joined, self._packing.compression)
        if not shards:
            raise UserError(f"not one full sample of {part.seq_len} tokens for {name}: the source is too small")
        with atomic(folder / INDEX) as partial:
            partial.write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        files = [shard["zip_data"] or shard["raw_data"] for shard in shards]
        manifest = {
            **_provenance(self._settings, name),
            "separator": self._packing.separator,
            "documents": sum(record["documents"] for record in records),
            "samples": sum(record["samples"] for record in records) + len(joined),
            "seq_len": part.seq_len,
            "dtype": rest.dtype.name,
            "tokens_left_over": len(rest) - joined.size,
            "sha256": {file["basename"]: file["hashes"]["sha256"] for file in files} | {INDEX: sha256(folder / INDEX)},
        }
        _write_manifest(folder, MANIFEST, manifest)

    def _record(self, number: int) -> dict[str, Any]:
        record = json.loads(record_path(self._folder, number).read_text())
        for name in self._packing.parts:
            record[name]["rest"] = np.array(record[name]["rest"], self._packing.dtype)
        return record

    def _look(self) -> bool:
        """Count the first pieces that are written, and no more than are needed. Whether they are enough.

        Raises:
            UserError: by what they hold, the whole source is far too small.
        """
        while not (enough := self._is_enough()) and record_path(self._folder, self._first).is_file():
            record = self._record(self._first)
            for name in self._packing.parts:
                self._tokens[name] += record[name]["tokens"]
                self._samples[name] += record[name]["samples"]
            self._first_bytes += self._pieces[self._first][1]
            self._first += 1
        expected = self._in_source()
        if not self._whole and expected is not None and expected < FAR_TOO_SMALL * self._wanted():
            raise self._too_small(expected)
        return enough

    def _is_enough(self) -> bool:
        parts = self._packing.parts.items()
        enough = all(self._samples[name] * part.seq_len >= part.tokens for name, part in parts)
        return enough and not self._whole

    def _wanted(self) -> int:
        return sum(part.tokens for part in self._packing.parts.values())

    def _in_source(self) -> int | None:
        """How many tokens the source may have; None before anything is known."""
        return round(sum(self._tokens.values()) / self._first_bytes * self._bytes) if self._first else None

    def _expected(self) -> int | None:
        return self._in_source() if self._whole else self._wanted()

    def _too_small(self, tokens: int) -> UserError:
        return UserError(
            f"the source holds some {tokens:,} tokens, and {self._wanted():,} are asked for: name a larger one, train "
            "fewer steps, or pass --whole to share out what there is"
        )

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        # Forked, a worker has the tokenizer and the libraries at once.
        context = multiprocessing.get_context("fork")
        job = (os.getpid(), self._folder, self._tokenizer, self._packing)
        return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=job)


def _begin(parent: int, folder: Path, tokenizer: Tokenizer, packing: Packing) -> None:
    """Make a worker that ends with its parent, however that ends.

    It works in a second thread: in a process's first one the tokenizer takes half as long again (docs/benchmarks.md),
    perhaps since glibc's malloc has another arena there.
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


_job: tuple[ThreadPoolExecutor, Path, Tokenizer, Packing]


def _write(number: int, piece: Piece) -> None:
    thread, folder, tokenizer, packing = _job
    thread.submit(write_piece, folder, number, piece, tokenizer, packing).result()


def _is_claimed(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether just this is prepared in `folder`. False: nothing is.

    Raises:
        UserError: something else is in it.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    plan = folder / PLAN
    if not plan.is_file():
        if names - {LOCK, WORK, PLAN, f"{PLAN}.partial"}:  # another task may be writing the last just now
            raise UserError(f"{folder} holds other files: choose another folder")
        return False
    before = json.loads(plan.read_text())
    if before != settings:
        raise UserError(
            f"{folder} was prepared from another {difference(before, dict(settings))}: remove it to prepare it "
            "anew, or choose another folder"
        )
    return True


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    if not _is_claimed(folder, settings):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / LOCK):
            if not _is_claimed(folder, settings):
                with atomic(folder / PLAN) as partial:
                    partial.write_text(json.dumps(settings, indent=2) + "\n")


def _is_complete(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name / MANIFEST).is_file() for name in names) and (folder / HELD_OUT / HELD_OUT_MARK).is_file()


def _manifests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / name / MANIFEST).read_text()) for name in names}


def _all_finished(folder: Path, task: int, tasks: int) -> bool:
    """Note that this task has finished. Whether all have."""
    path = folder / WORK / f"finished-of-{tasks}"
    with open(path, "a+") as file:
        file.write(f"{task}\n")
        file.seek(0)
        return len(set(file.read().split())) == tasks


def _provenance(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: settings[name] for name in ("source", "tokenizer", "seed", "version")} | {"part": part}


def _write_manifest(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest, and remove what it does not name: pieces that proved not to be needed."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in manifest["sha256"]:
            path.unlink()
    with atomic(folder / name) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def _fingerprint(source: Path) -> str:
    """A digest of the names and sizes of a source's files."""
    digest = new_sha256()
    for path in text_files(source):
        digest.update(f"{path.relative_to(source)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
