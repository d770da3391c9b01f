"""The helper that the distributed tests stand on: results by rank, and no failure that passes or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from halo.distributed import all_sum
from tests.distributed.ranks import run_ranks


def _sum_of_ranks(add: int) -> tuple[int, int]:
    return dist.get_rank(), int(all_sum(torch.tensor(dist.get_rank() + add)))


def _rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.barrier()


def _rank_one_exits() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _rank_one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_by_rank() -> None:
    assert run_ranks(2, _sum_of_ranks, 10) == [(0, 21), (1, 21)]


def test_a_ranks_exception_is_raised_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="lost") as caught:
        run_ranks(2, _rank_one_raises)
    assert any("on rank 1" in note and "_rank_one_raises" in note for note in caught.value.__notes__)


def test_a_dead_rank_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, _rank_one_exits)


def test_a_hanging_rank_is_an_error() -> None:
    with pytest.raises(TimeoutError, match="gave no result"):
        run_ranks(2, _rank_one_sleeps, timeout=1)
