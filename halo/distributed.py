"""The few collectives that HALO needs beside DeepSpeed's. Every function also works in one process without ranks."""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from halo.accelerator import on_gpu
from halo.errors import UserError, in_one_line

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(hours=24)
"""How long a rank waits for another where their work differs: rank 0 alone downloads, tokenizes and writes."""
STEP_LIMIT = timedelta(minutes=5)
"""How long a rank waits for another within a training step: a rank that takes longer hangs. It is enough for a file
system that stalls, and for a rank that writes a trace. A rank that dies is noticed at once, by its connections and its
launcher."""
SLOW_LIMIT = timedelta(hours=1)
"""The same for the first step, which compiles, and for checkpoints."""

_limits = [PATIENCE]
"""Those in force, the innermost last."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This rank's own GPU, or the CPU where there is no GPU."""
    if on_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def say(line: str) -> None:
    """One line of plain words, from rank 0."""
    if rank() == 0:
        print(line, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def waits_of_at_most(limit: timedelta) -> Iterator[None]:
    """Inside, a collective of any group fails if it waits longer than `limit` for a rank. Outside, PATIENCE counts, or
    the limit of the block around."""
    _limits.append(limit)
    _limit_waits(limit)
    try:
        yield
    finally:
        _limits.pop()
        _limit_waits(_limits[-1])


def _limit_waits(limit: timedelta) -> None:
    # All groups: DeepSpeed trains on a group that it makes.
    for group in dist.distributed_c10d._world.pg_map:
        for kind in group._device_types:
            group._get_backend(kind)._set_default_timeout(limit)


def on_rank0(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` with these arguments on rank 0 alone. Returns its result on every rank.

    Raises:
        UserError: `function` raised it, or the system refused something; on every rank, so that all end together.
        RuntimeError: `function` raised another exception; its traceback is the message. In one process: that exception.
    """
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            with in_one_line():
                outcome = [(function(*args, **kwargs), None)]
        except UserError as error:
            outcome = [(None, error)]
        except Exception as error:
            if world_size() == 1:
                raise
            # As text: not every exception survives pickling.
            outcome = [(None, RuntimeError("".join(traceback.format_exception(error))))]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, device=device() if on_gpu() else None)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def from_rank0(value: T) -> T:
    """The value that rank 0 has, on every rank; the other ranks' values are ignored."""
    return on_rank0(_same, value)


def _same(value: T) -> T:
    return value


def on_every_rank(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    """Run `function` with these arguments on every rank. Returns all results on every rank, in the order of ranks.

    Raises:
        UserError: `function` raised it on some rank, or the system refused something there; the first of them, on
            every rank, so that all end together.
    """
    result: T | None = None
    failure: UserError | None = None
    try:
        with in_one_line():
            result = function(*args, **kwargs)
    except UserError as error:
        failure = error
    outcomes: list[tuple[T | None, UserError | None]] = [(result, failure)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(outcomes, (result, failure))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]  # type: ignore[misc]


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, on every rank, as a new tensor on this rank's device."""
    total = tensor.to(device(), copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's values into `tensors`, which are on this rank's device."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)
