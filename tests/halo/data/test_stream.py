"""The stream's order depends only on the seed: not on the number of ranks, not on where it was resumed."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from halo.data.shards import write_shards
from halo.data.stream import TokenStream
from halo.errors import UserError
from tests.halo.data.reading import read_samples

SAMPLES = 53  # no multiple of a batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = np.repeat(np.arange(SAMPLES, dtype=np.uint16)[:, None], 4, axis=1)
    write_shards(tmp_path / "shards", samples, {})
    return tmp_path / "shards"


def _ids(stream: TokenStream, steps: int) -> list[list[int]]:
    return [next(stream)[:, 0].tolist() for _ in range(steps)]


def _joined(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def _stream(folder: Path, micro_batch: int = 8, seed: int = 0, rank: int = 0, world_size: int = 1) -> TokenStream:
    return TokenStream(folder, micro_batch=micro_batch, seed=seed, rank=rank, world_size=world_size)


def test_batches(folder: Path) -> None:
    batch = next(_stream(folder))
    assert (batch.shape, batch.dtype) == ((8, 4), torch.int64)
    assert read_samples(folder)[:, 0].tolist() == list(range(SAMPLES))


def test_an_epoch_is_a_permutation_and_epochs_differ(folder: Path) -> None:
    order = _joined(_ids(_stream(folder, micro_batch=1), 3 * SAMPLES))
    epochs = [order[i * SAMPLES : (i + 1) * SAMPLES] for i in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != _joined(_ids(_stream(folder, micro_batch=1, seed=1), 3 * SAMPLES))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 4), (4, 2), (8, 1)])
def test_ranks_share_the_batches_of_one(folder: Path, ranks: int, micro_batch: int) -> None:
    one = _ids(_stream(folder), 14)
    shares = [_ids(_stream(folder, micro_batch, 0, rank, ranks), 14) for rank in range(ranks)]
    assert [_joined(step) for step in zip(*shares, strict=True)] == one


@pytest.mark.parametrize("done", [0, 3, 6, 7, 20])
def test_resume_is_exact(folder: Path, done: int) -> None:
    stream = _stream(folder)
    _ids(stream, done)
    state = stream.state_dict()
    resumed = _stream(folder)
    resumed.load_state_dict(state)
    halves = [_stream(folder, 4, 0, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    onward = _ids(stream, 10)
    assert _ids(resumed, 10) == onward
    assert [_joined(step) for step in zip(*(_ids(half, 10) for half in halves), strict=True)] == onward


def test_more_ranks_than_samples(folder: Path) -> None:
    with pytest.raises(UserError, match="54 ranks x 1 samples at a time are more than the 53 samples"):
        _stream(folder, 1, 0, 0, 54)


def test_a_state_of_another_run(folder: Path, tmp_path: Path) -> None:
    state = _stream(folder, seed=1).state_dict()
    with pytest.raises(UserError, match="its seed is 1, not 0"):
        _stream(folder).load_state_dict(state)
    with pytest.raises(UserError, match="its samples is 9, not 53"):
        _stream(folder).load_state_dict(state | {"seed": 0, "samples": 9})
