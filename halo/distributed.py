"""The few collectives that HALO needs beside DeepSpeed's own. Every function also works in one plain process."""

import os
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from halo.errors import UserError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This rank's device: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_rank0(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone and hand its result to every rank.

    Raises:
        UserError: `function` raised it; on every rank, so that all end together.
        RuntimeError: `function` raised anything else (in one plain process: that itself).
    """
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except Exception as error:
            if world_size() == 1:
                raise
            # As text: not every exception survives pickling.
            outcome = [(None, RuntimeError("".join(traceback.format_exception(error))))]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, device=device() if torch.cuda.is_available() else None)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, on every rank (a new tensor)."""
    total = tensor.to(device(), copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total
