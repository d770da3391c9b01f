"""The training data stream: token shards in a random order, the same for any number of ranks, resumable anywhere.

Sample n of a run depends only on the seed, the sizes of the shards, and n. In each epoch, all shards are put in random
order and cut into blocks of about `BLOCK_BYTES`; within a block, the samples are in random order. So only two blocks
are needed at a time: the one that is being read, and the next, which a thread fetches meanwhile (halo/data/reader.py).
Shards that fit one block are shuffled as a whole.

The files have the format of the library `streaming`, and its downloaders fetch them. Its `StreamingDataset` is not
used: it ends each epoch on a short batch, hangs if the ranks in use are not those of the environment (students beside
dedicated teachers), and leaves shared memory behind when it is killed. Here the kernel frees all that a killed process
held.
"""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halo.data.reader import ShardReader
from halo.data.storage import Cache
from halo.errors import UserError

BLOCK_BYTES = 1 << 28
"""Bytes of shards that are shuffled together: 131,000 samples of 512 tokens in uint32."""


class TokenStream(Iterator[torch.Tensor]):
    """An endless iterator over micro-batches, int64 [micro_batch, T]. Each epoch is a new permutation of all samples.

    There is one global sequence of samples, in which epochs follow each other without a gap. In each step the ranks
    read consecutive micro-batches of it, in the order of the ranks. So one rank with twice the micro-batch sees the
    same samples in each step. Ranks that read the same samples (a group of sequence parallelism) all pass the number
    of their group as `rank`, and the number of groups as `world_size`.

    Args:
        folder: a folder of shards, or its URL in object storage.
        cache: for copies of shards on the node's own disk (see ShardReader).
        words: how many tokens the model has. None: any are read.

    Raises:
        UserError: a step needs more samples than there are, or the cache is too small for two blocks. From `next`: a
            shard is missing, truncated or altered.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        micro_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        cache: Cache | None = None,
        words: int | None = None,
    ):
        self._reader = ShardReader(folder, cache, words)
        self._samples = len(self._reader)
        self._micro_batch = micro_batch
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._consumed = 0  # samples, by all ranks together
        self._epoch = self._shuffled(0)
        self._at = (-1, -1)  # epoch and block
        if micro_batch * world_size > self._samples:
            raise UserError(
                f"{world_size} ranks x {micro_batch} samples at a time are more than the {self._samples} samples "
                f"in {folder}: use fewer ranks, a smaller micro-batch or more data"
            )
        largest, total = int(self._reader.bytes.max()), int(self._reader.bytes.sum())
        needed = min(2 * (BLOCK_BYTES + 2 * largest), total + largest)
        if cache is not None and cache.limit < needed:
            raise UserError(f"shards_cache_gb is too small for {folder}: {needed / 1e9:.3g} GB are needed at a time")

    def __next__(self) -> torch.Tensor:
        begin = self._consumed + self._rank * self._micro_batch
        samples = np.stack([self._sample(begin + i) for i in range(self._micro_batch)])
        self._consumed += self._world_size * self._micro_batch
        return torch.from_numpy(samples.astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream: the same on all ranks, and valid for any number of ranks."""
        return {"consumed": self._consumed, "seed": self._seed, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a saved position.

        Raises:
            UserError: the state was saved with another seed or another amount of data.
        """
        for name, here in (("seed", self._seed), ("samples", self._samples)):
            if state.get(name) != here:
                raise UserError(
                    f"the data stream's saved state is of another run: its {name} is {state.get(name)}, not {here}"
                )
        self._consumed = state["consumed"]

    def _sample(self, position: int) -> np.ndarray:
        epoch, place = divmod(position, self._samples)
        if epoch != self._epoch.number:
            self._epoch = self._shuffled(epoch)
        block = bisect(self._epoch.ends, place)
        if (epoch, block) != self._at:
            self._at = epoch, block
            blocks = self._epoch.blocks
            following = blocks[block + 1] if block + 1 < len(blocks) else self._shuffled(epoch + 1).blocks[0]
            self._reader.prepare([*blocks[block], *following])
        return self._reader.read(int(self._epoch.order[place]))

    def _shuffled(self, epoch: int) -> "Epoch":
        return shuffle(self._reader.samples, self._reader.bytes, self._seed, epoch)


@dataclass(frozen=True)
class Epoch:
    """The order of all samples in one epoch."""

    number: int
    blocks: list[list[int]]
    """The shards of each block."""
    ends: list[int]
    """For each block, the number of samples in it and in all blocks before it."""
    order: np.ndarray
    """The samples' numbers, int64 [samples]."""


def shuffle(samples: np.ndarray, sizes: np.ndarray, seed: int, epoch: int) -> Epoch:
    """The order of an epoch: shards in random order, cut into blocks, and samples in random order within a block.

    Args:
        samples: the number of samples of each shard, int64 [shards].
        sizes: the bytes of each shard, int64 [shards].
    """
    shards = np.random.default_rng([seed, epoch, 1]).permutation(len(samples))
    before = np.cumsum(sizes[shards]) - sizes[shards]
    total = int(sizes.sum())
    block_of = before * -(-total // BLOCK_BYTES) // total
    blocks = [sorted(shards[block_of == block].tolist()) for block in np.unique(block_of)]
    begins = np.cumsum(samples) - samples
    rng = np.random.default_rng([seed, epoch])
    orders = []
    for block in blocks:
        numbers = np.concatenate([np.arange(begins[shard], begins[shard] + samples[shard]) for shard in block])
        orders.append(numbers[rng.permutation(len(numbers))])
    return Epoch(epoch, blocks, np.cumsum([len(order) for order in orders]).tolist(), np.concatenate(orders))
