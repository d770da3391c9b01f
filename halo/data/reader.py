"""Reading token shards: samples by number, from shards that a thread opens before they are needed.

The SHA-256 of a shard is verified when it is first read: in its folder, while it is copied into the cache, or, if it is
compressed, before it is unpacked. So training starts without first reading tens of gigabytes.
"""

import threading
import weakref
from bisect import bisect
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from streaming.base.compression import decompress

from halo.data.manifest import ShardEntry, checked_index
from halo.data.shards import INDEX, open_manifest
from halo.data.storage import Cache, fetch, is_remote, read_bytes
from halo.errors import UserError
from halo.run import sha256

Opener = Callable[[int], np.ndarray]


class ShardReader:
    """The samples of a folder or URL of shards.

    Args:
        cache: keeps copies of shards. Needed for a URL and for compressed shards; useful for a slow folder.
        words: each token must be smaller than this. None: any.

    Raises:
        UserError: there are no shards, or they need a cache.
    """

    def __init__(self, source: str | Path, cache: Cache | None = None, words: int | None = None):
        files = _Files(source, cache, words)
        self.samples = files.samples
        """The number of samples in each shard, int64 [shards]."""
        self.bytes = files.bytes
        """The size of each shard, uncompressed, int64 [shards]."""
        self._ends = np.cumsum(self.samples).tolist()
        self._open: dict[int, Future[np.ndarray]] = {}
        self._queue: SimpleQueue[tuple[int, weakref.ref[Future[np.ndarray]]] | None] = SimpleQueue()
        threading.Thread(target=_open_all, args=(self._queue, files.open), daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def __len__(self) -> int:
        return int(self.samples.sum())

    def prepare(self, shards: Iterable[int]) -> None:
        """Begin to open these shards, in this order, and close all others."""
        before, self._open = self._open, {}
        for shard in shards:
            if shard in before:
                self._open[shard] = before[shard]
            else:
                future: Future[np.ndarray] = Future()
                self._open[shard] = future
                self._queue.put((shard, weakref.ref(future)))

    def read(self, number: int) -> np.ndarray:
        """A sample by its number, counted over all shards: [T] in the dtype of the shards, memory-mapped.

        Raises:
            UserError: its shard is missing, truncated or altered, cannot be fetched, or has tokens that no model has.
        """
        shard = bisect(self._ends, number)
        if shard not in self._open:
            self.prepare([*self._open, shard])
        return self._open[shard].result()[number - self._ends[shard]]  # a negative index, from the end


def _open_all(queue: "SimpleQueue[tuple[int, weakref.ref[Future[np.ndarray]]] | None]", opener: Opener) -> None:
    while (item := queue.get()) is not None:
        shard, reference = item
        future = reference()
        if future is None:  # no longer needed
            continue
        try:
            future.set_result(opener(shard))
        except BaseException as error:
            future.set_exception(error)


class _Files:
    """The files of shards, and how to open one."""

    def __init__(self, source: str | Path, cache: Cache | None, words: int | None):
        self._source, self._cache, self._words = source, cache, words
        manifest = open_manifest(source)
        self._dtype, self.seq_len, self._digests = np.dtype(manifest["dtype"]), manifest["seq_len"], manifest["sha256"]
        self._shards = checked_index(source, read_bytes(source, INDEX), manifest)
        self.samples = np.array([shard.samples for shard in self._shards])
        self.bytes = np.array([shard.raw_data.bytes for shard in self._shards])
        compressed = any(shard.zip_data for shard in self._shards)
        if cache is None and (compressed or is_remote(source)):
            what = "are compressed" if compressed else "are in object storage"
            raise UserError(
                f"the shards in {source} {what}: name a folder on the nodes' own disks for them (shards_cache)"
            )

    def open(self, shard: int) -> np.ndarray:
        """The samples of a shard: [N, T] in the dtype of the shards, memory-mapped."""
        info = self._shards[shard]
        if self._cache is None:
            path = Path(self._source, info.raw_data.basename)
            self._verify(path, info.raw_data.basename)
        else:
            size = info.raw_data.bytes + (info.zip_data.bytes if info.zip_data else 0)
            name = f"{self._digests[info.stored.basename]}.mds"
            path = self._cache.get(name, size, lambda partial: self._copy(info, partial))
        begin = int(np.fromfile(path, np.uint32, count=2)[1])  # where the first sample begins; all have one size
        samples = np.memmap(path, self._dtype, "r", begin, (info.samples, self.seq_len))
        if self._words is not None and (most := int(samples.max())) >= self._words:
            raise UserError(
                f"{self._source}/{info.stored.basename} has the token {most}, but the model has {self._words}: "
                "prepare the shards with the teacher's tokenizer"
            )
        return samples

    def _copy(self, info: ShardEntry, partial: Path) -> None:
        fetched = partial.with_suffix(".partial-fetched") if info.zip_data else partial
        fetch(self._source, info.stored.basename, fetched, info.stored.bytes)
        self._verify(fetched, info.stored.basename)
        if info.zip_data:
            partial.write_bytes(decompress(info.compression, fetched.read_bytes()))
            fetched.unlink()

    def _verify(self, path: Path, name: str) -> None:
        try:
            digest = sha256(path)
        except FileNotFoundError:
            digest = None
        if digest != self._digests[name]:
            state = "missing" if digest is None else "truncated or altered"
            raise UserError(f"{self._source}/{name} is {state}; remove {self._source} and prepare it anew")
