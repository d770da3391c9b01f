"""From a text source to token shards for every stage, in one pass over it, on many processes and nodes.

    <folder>/plan.json                 what is prepared here, and from what
    <folder>/<stage>/                  MDS shards: <piece>/shard.*.mds, index.json, and manifest.json, written last
    <folder>/held_out/                 text that no stage trains on: <piece>.parquet, and held_out.json, written last
    <folder>/preparation/              locks, and a record of each written piece; removed at the end

The source is cut into pieces of one size, and the seed decides their order. A worker process tokenizes a piece and
packs it into samples for each stage (halo/data/worker.py). The first pieces are used, as many as all stages together
need. Tokens that a piece leaves over are joined with those of the others into further samples. So each byte depends on
the source, the tokenizer and the settings, and not on the number of processes or nodes, or on how often one was killed.

Several tasks, on several nodes, may share the work: each takes the next piece that no other task works on. The last
task to finish writes the joined samples, the indexes and the manifests.
"""

import copy
import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from halo import __version__
from halo.data.corpus import HELD_OUT_MARK, Piece, cut, text_files
from halo.data.locks import TaskLock, exclusive, try_lock
from halo.data.packing import HELD_OUT, Packing, Part, cut_samples, token_dtype
from halo.data.shards import INDEX, SHARDS_MANIFEST, open_manifest, write_samples
from halo.data.worker import WORK, HeldOutRecord, PartRecord, record_path, worker_pool, write_in_worker
from halo.errors import UserError, in_one_line, naming
from halo.json_files import read_json
from halo.models.tokenizer import separator_id, tokenizer_hash
from halo.progress import progress_bar
from halo.run import atomic, difference, sha256

PIECE = 1 << 25
"""Bytes of text in a piece: about eight million tokens, half a minute of work for a core."""
HELD_OUT_SHARE = 0.005
"""The share of documents: 12 million of 2.3 billion tokens, more than the measuring stages read."""

PLAN = "plan.json"
LOCK = "plan.lock"
FAR_TOO_SMALL = 0.8
"""A share of the tokens needed. A source that seems to have fewer is refused after its first piece, not at its end."""


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
    """Prepare each part's shards, and the held-out text, in `folder`. Resume where an earlier call ended.

    Args:
        parts: by the names of their folders. Each gets at least its `tokens`, in samples of its `seq_len`.
        source_name: the name of the source in the manifests, if not its path.
        whole: use all of the source, not only what `parts` need; their `tokens` are then proportions.
        held_out: the share of documents that belongs to no part.
        workers: the number of processes that tokenize.
        task, tasks: this call does task `task`; other calls do the others, numbered 0 to tasks - 1.

    Returns:
        The manifests by part, or None while other tasks have not finished.

    Raises:
        UserError: the source is too small or cannot be read, the folder has other content, another process
            works on it, or it cannot be written.
    """
    if not 0 <= task < tasks or workers < 1 or not 0 <= held_out < 1:
        raise UserError(
            f"task {task} of {tasks}, {workers} workers, {held_out} held out: tasks count from 0, workers from 1, and "
            "the held-out share is from 0 to below 1"
        )
    separator, dtype = separator_id(tokenizer), token_dtype(len(tokenizer)).name
    packing = Packing(
        parts=dict(parts), held_out=held_out, seed=seed, separator=separator, dtype=dtype, compression=compression
    )
    settings = {
        "source": source_name or str(source),
        "source_files": _source_digest(source),
        "tokenizer": tokenizer_hash(tokenizer),
        "whole": whole,
        "piece_bytes": piece_bytes,
        "version": __version__,
        **asdict(packing),
    }
    with in_one_line(), naming(folder):
        pieces = _Pieces(source, copy.deepcopy(tokenizer.backend_tokenizer), folder, packing, settings)
        return _prepare(pieces, folder, settings, workers, task, tasks)


def _prepare(
    pieces: "_Pieces", folder: Path, settings: Mapping[str, Any], workers: int, task: int, tasks: int
) -> dict[str, dict[str, Any]] | None:
    """Do this task's share of the work, and if it is the last to finish, write the end. Returns as `prepare` does."""
    parts = settings["parts"]
    _claim_folder(folder, settings)
    with exclusive(folder / LOCK):
        if _is_complete(folder, parts):
            shutil.rmtree(folder / WORK, ignore_errors=True)  # a kill may have left some of it
            return _manifests(folder, parts)
        (folder / WORK).mkdir(exist_ok=True)
        lock = TaskLock(folder / WORK, task, tasks)
    try:
        pieces.write(workers)
        with exclusive(folder / LOCK):
            if not (_all_finished(folder, task, tasks) and lock.is_alone()):
                lock.release()
                return None
            pieces.write(workers)  # those of a task that was killed
            pieces.finish()
            shutil.rmtree(folder / WORK)
            return _manifests(folder, parts)
    finally:
        lock.release()


class _Pieces:
    """The pieces of a source, in their order, and how many of the first are written."""

    def __init__(self, source: Path, tokenizer: Tokenizer, folder: Path, packing: Packing, settings: Mapping[str, Any]):
        self._tokenizer, self._folder, self._packing, self._settings = tokenizer, folder, packing, settings
        self._whole = settings["whole"]
        pieces = cut(source, settings["piece_bytes"])
        order = np.random.default_rng(packing.seed).permutation(len(pieces))
        self._pieces: list[tuple[Piece, int]] = [pieces[i] for i in order]
        self._bytes = sum(size for _, size in pieces)
        # The first pieces that are needed and written, up to the first gap: how many, their bytes, and what they hold.
        self._counted = 0
        self._counted_bytes = 0
        self._tokens = dict.fromkeys(packing.parts, 0)
        self._samples = dict.fromkeys(packing.parts, 0)

    def write(self, workers: int) -> None:
        """Write the first pieces that are not written yet and that no other task works on, until they are enough."""
        done: set[int] = set()
        running: dict[Future[None], int] = {}
        enough = self._count()
        bar = progress_bar(self._expected(), "prepare", " tokens", sum(self._tokens.values()), delay=1.0, scale=True)
        pool = worker_pool(workers, self._folder, self._tokenizer, self._packing)
        with bar, open(self._folder / WORK / "pieces.lock", "a+b") as claims, pool:
            try:
                while not enough:
                    # One more than there are workers, so that none waits.
                    for number in self._next(workers + 1 - len(running), {*done, *running.values()}, claims):
                        running[pool.submit(write_in_worker, number, self._pieces[number][0])] = number
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        done.add(running.pop(future))
                    enough = self._count()
                    bar.total = self._expected()
                    bar.update(sum(self._tokens.values()) - bar.n)
            except BrokenProcessPool as error:
                raise UserError("a worker process was killed, perhaps out of memory: use fewer --workers") from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _next(self, count: int, known: Collection[int], claims: IO[bytes]) -> list[int]:
        """The next `count` pieces, or fewer, for this task to write. They are locked for it."""
        found: list[int] = []
        for number in range(self._counted, len(self._pieces)):
            if len(found) == count:
                break
            if number not in known and not record_path(self._folder, number).is_file() and try_lock(claims, number, 1):
                found.append(number)
        return found

    def finish(self) -> None:
        """Write the joined samples, the indexes, and the manifests.

        Raises:
            UserError: the source has fewer tokens than the parts need.
        """
        enough = self._count()
        if not (enough or self._whole):
            raise self._too_small(sum(self._tokens.values()))
        records = [self._record(number) for number in range(self._counted)]
        # A piece that an older version wrote did not count them.
        source = {**self._settings, "skipped": sum(record.get("skipped", 0) for record in records)}
        for name, part in self._packing.parts.items():
            self._finish_part(name, part, [record[name] for record in records], source)
        held_out = [record[HELD_OUT] for record in records]
        manifest = {
            **_provenance(source, HELD_OUT),
            "documents": sum(one["documents"] for one in held_out),
            "sha256": {name: digest for one in held_out for name, digest in one["sha256"].items()},
        }
        _write_manifest(self._folder / HELD_OUT, HELD_OUT_MARK, manifest)

    def _finish_part(
        self, name: str, part: Part, records: Sequence[Mapping[str, Any]], source: Mapping[str, Any]
    ) -> None:
        folder = self._folder / name
        rests = [np.empty(0, self._packing.dtype), *(record["rest"] for record in records)]
        joined, rest = cut_samples(np.concatenate(rests), part.seq_len)
        shards = [shard for record in records for shard in record["shards"]]
        shards += write_samples(folder, "joined", joined, self._packing.compression)
        if not shards:
            raise UserError(f"not one full sample of {part.seq_len} tokens for {name}: the source is too small")
        with atomic(folder / INDEX) as partial:
            partial.write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        files = [shard["zip_data"] or shard["raw_data"] for shard in shards]
        manifest = {
            **_provenance(source, name),
            "separator": self._packing.separator,
            "documents": sum(record["documents"] for record in records),
            "samples": sum(record["samples"] for record in records) + len(joined),
            "seq_len": part.seq_len,
            "dtype": rest.dtype.name,
            "tokens_left_over": len(rest),
            "sha256": {file["basename"]: file["hashes"]["sha256"] for file in files} | {INDEX: sha256(folder / INDEX)},
        }
        _write_manifest(folder, SHARDS_MANIFEST, manifest)

    def _record(self, number: int) -> dict[str, Any]:
        path, anew = record_path(self._folder, number), f"remove {self._folder} to prepare it anew"
        record: dict[str, Any] = read_json(path, dict[str, PartRecord | HeldOutRecord | int], anew)
        for name in (*self._packing.parts, HELD_OUT):
            if not isinstance(record.get(name), dict):
                raise UserError(f"{path} lacks {name}: {anew}")
        for name in self._packing.parts:
            record[name]["rest"] = np.array(record[name]["rest"], self._packing.dtype)
        return record

    def _count(self) -> bool:
        """Count the first pieces that are written, and no more than are needed. Returns whether they are enough.

        Raises:
            UserError: estimated from these pieces, the whole source is far too small.
        """
        while not (enough := self._is_enough()) and record_path(self._folder, self._counted).is_file():
            record = self._record(self._counted)
            for name in self._packing.parts:
                self._tokens[name] += record[name]["tokens"]
                self._samples[name] += record[name]["samples"]
            self._counted_bytes += self._pieces[self._counted][1]
            self._counted += 1
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
        """An estimate of the source's tokens; None before the first piece is counted."""
        if not self._counted:
            return None
        return round(sum(self._tokens.values()) / max(self._counted_bytes, 1) * self._bytes)

    def _expected(self) -> int | None:
        return self._in_source() if self._whole else self._wanted()

    def _too_small(self, tokens: int) -> UserError:
        return UserError(
            f"the source holds about {tokens:,} tokens, and {self._wanted():,} are needed: name a larger one, train "
            "fewer steps, or pass --whole to divide what it has among the stages"
        )


def _is_claimed(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a preparation with these settings has begun in `folder`. False: none has begun.

    Raises:
        UserError: `folder` has a preparation with other settings, or other files.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    plan = folder / PLAN
    if not plan.is_file():
        if names - {LOCK, WORK, PLAN, f"{PLAN}.partial"}:  # another task may just be writing the plan
            raise UserError(f"{folder} holds other files: choose another folder")
        return False
    before = read_json(plan, dict[str, Any], f"remove {folder} to prepare it anew")
    if before != settings:
        raise UserError(
            f"{folder} was prepared from another {difference(before, dict(settings))}: remove it to prepare it "
            "anew, or choose another folder"
        )
    return True


def _claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    if not _is_claimed(folder, settings):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / LOCK):
            if not _is_claimed(folder, settings):
                with atomic(folder / PLAN) as partial:
                    partial.write_text(json.dumps(settings, indent=2) + "\n")


def _is_complete(folder: Path, names: Iterable[str]) -> bool:
    return (
        all((folder / name / SHARDS_MANIFEST).is_file() for name in names)
        and (folder / HELD_OUT / HELD_OUT_MARK).is_file()
    )


def _manifests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: open_manifest(folder / name) for name in names}


def _all_finished(folder: Path, task: int, tasks: int) -> bool:
    """Record that this task has finished. Returns whether all have."""
    path = folder / WORK / f"finished-of-{tasks}"
    with open(path, "a+") as file:
        file.write(f"{task}\n")
        file.seek(0)
        return len(set(file.read().split())) == tasks


def _provenance(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    names = ("source", "tokenizer", "seed", "version", "skipped")
    return {name: settings[name] for name in names} | {"part": part}


def _write_manifest(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest, and remove files that it does not name: pieces that were not needed after all."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in manifest["sha256"]:
            path.unlink()
    with atomic(folder / name) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def _source_digest(source: Path) -> str:
    """A digest of the names and sizes of a source's files."""
    digest = new_sha256()
    for path in text_files(source):
        digest.update(f"{path.relative_to(source)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
