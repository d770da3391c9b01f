"""The training data stream: token shards in a random order, the same for any number of ranks, resumable anywhere.

It reads shards through streaming's `LocalDataset` and orders them itself: sample n of a run depends on the seed and n
alone. `StreamingDataset` ends each epoch on a short batch, hangs where the ranks in use are not those of the
environment (as a student's beside a teacher's own), and leaves shared memory behind when it is killed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import LocalDataset

from halo.errors import UserError
from halo.shards import COLUMN


class TokenStream(Iterator[torch.Tensor]):
    """An endless iterator over int64 [micro_batch, T]: each epoch is a new permutation of all samples.

    The ranks' batches of one step, in the order of their ranks, are the next samples of one global sequence, and epochs
    follow on each other without a gap. So one rank with twice the micro-batch sees the same samples at each step.

    Raises:
        UserError: a step takes more samples than there are.
    """

    def __init__(self, folder: str | Path, *, micro_batch: int, seed: int, rank: int, world_size: int):
        self._dataset = LocalDataset(str(folder))
        self._micro_batch = micro_batch
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._consumed = 0  # samples, by all ranks together
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        if micro_batch * world_size > len(self._dataset):
            raise UserError(
                f"{world_size} ranks x {micro_batch} samples at a time are more than the {len(self._dataset)} samples "
                f"in {folder}: use fewer ranks, a smaller micro-batch or more data"
            )

    def __next__(self) -> torch.Tensor:
        begin = self._consumed + self._rank * self._micro_batch
        samples = [self._dataset[self._sample_at(begin + i)][COLUMN] for i in range(self._micro_batch)]
        self._consumed += self._world_size * self._micro_batch
        return torch.from_numpy(np.stack(samples).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the same on all ranks, and loadable with another number of them."""
        return {"consumed": self._consumed, "seed": self._seed, "samples": len(self._dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        UserError: the state belongs to another seed or another amount of data.
        """
        for name, here in (("seed", self._seed), ("samples", len(self._dataset))):
            if state[name] != here:
                raise UserError(
                    f"the data stream's saved state is of another run: its {name} is {state[name]}, not {here}"
                )
        self._consumed = state["consumed"]

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._dataset))
        return int(self._order[place])


def read_samples(folder: str | Path) -> torch.Tensor:
    """All samples of a small folder in the order they were written, int64 [N, T]."""
    dataset = LocalDataset(str(folder))
    return torch.from_numpy(np.stack([dataset[i][COLUMN] for i in range(len(dataset))]).astype(np.int64))
