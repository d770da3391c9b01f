"""Jobs (tests/distributed/jobs.py) in which something fails: they are stopped, frozen or refused, or data are bad."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from halo.config import Training
from halo.distributed import rank
from halo.errors import Stopped, UserError
from halo.teacher.batch import Batch
from halo.training import trainer
from halo.training.background import Files, Writing
from halo.training.checkpoint import Checkpoints
from halo.training.engine import Engine
from halo.training.objectives import NextToken
from tests.distributed.jobs import digest, make_student, make_teacher, run, use_bf16


def at_step(step: int, do: Callable[[], None], job: Callable[..., Any], *args: Any) -> Any:
    """Run `job`, and `do` as the 0-based `step` begins."""
    plain = trainer.learning_rate

    def learning_rate(settings: Training, now: int) -> float:
        if now == step:
            do()
        return plain(settings, now)

    trainer.learning_rate = learning_rate
    return job(*args)


def written_at_once(job: Callable[..., Any], *args: Any) -> Any:
    """`job`, where a checkpoint is published by the end of the step after it: each rank waits for its part there."""
    plain = Checkpoints.is_written

    def is_written(self: Checkpoints) -> bool:
        if self._pending is not None:
            self._pending.writing._thread.join()
        return plain(self)

    Checkpoints.is_written = is_written
    return job(*args)


def written_late(job: Callable[..., Any], *args: Any) -> Any:
    """`job`, where no checkpoint is written before the run stands still to wait for it."""
    awaited = threading.Event()
    run_thread, wait = Writing._run, Writing.wait

    def wait_for_wait(self: Writing) -> None:
        awaited.wait()
        run_thread(self)

    def waited_for(self: Writing) -> tuple[Files, float]:
        awaited.set()
        try:
            return wait(self)
        finally:
            awaited.clear()

    Writing._run, Writing.wait = wait_for_wait, waited_for
    return job(*args)


def failing(step: int, job: Callable[..., Any], *args: Any) -> None:
    """`job`, whose process fails as `step` begins."""

    def fail() -> None:
        raise RuntimeError("stopped")

    at_step(step, fail, job, *args)


def interrupted(step: int, job: Callable[..., Any], *args: Any) -> None:
    """The same, where a checkpoint is published by the end of the step after it."""
    written_at_once(failing, step, job, *args)


def interrupted_amid_writing(step: int, job: Callable[..., Any], *args: Any) -> None:
    """The same, where nothing is written yet of what was last saved."""
    written_late(failing, step, job, *args)


def asked_to_stop(step: int, number: int, job: Callable[..., Any], *args: Any) -> str:
    """`job`, where a signal comes to rank 1 alone in `step`."""
    try:
        at_step(step, lambda: os.kill(os.getpid(), number) if rank() == 1 else None, job, *args)
    except Stopped as stopped:
        return str(stopped)
    raise AssertionError("the run did not stop")


def frozen_in_time(step: int, limit: float, job: Callable[..., Any], *args: Any) -> None:
    """`job`, where rank 1 halts in `step`, and the other waits at most `limit` seconds for it."""
    trainer.STEP_LIMIT = timedelta(seconds=limit)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP) if rank() == 1 else None, job, *args)


def on_a_full_disk(step: int, job: Callable[..., Any], *args: Any) -> str:
    """`job`, where rank 1 can write no file above 50 kB from `step` on. Returns what it was refused with."""
    return refused(at_step, step, lambda: _limit_files(50_000) if rank() == 1 else None, job, *args)


def with_no_room_for(pattern: str, step: int, job: Callable[..., Any], shards: Path, folder: Path, *args: Any) -> str:
    """`job`, where a file of rank 0's in `folder` can grow no more from `step` on. Returns what it was refused with."""

    def fill() -> None:
        if rank() == 0:
            (file,) = folder.glob(pattern)
            _limit_files(file.stat().st_size)

    return refused(at_step, step, fill, job, shards, folder, *args)


def refused(job: Callable[..., Any], *args: Any) -> str:
    """What `job` is refused with."""
    try:
        written_at_once(job, *args)
    except UserError as error:
        return str(error)
    raise AssertionError("the run did not end")


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


BAD = 63
"""A sample that begins with this token has no finite loss, or gradient, in a Fragile objective."""


class Fragile(NextToken):
    gradient_alone = False

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(batch)
        if (batch.input_ids[:, 0] == BAD).any():
            # The square root is 0, and infinitely steep there.
            loss = loss + ((loss - loss.detach()).sqrt() if self.gradient_alone else torch.inf)
        return loss, metrics


def fragile(
    shards: Path,
    folder: Path,
    zero: str,
    settings: Training,
    bf16: bool = False,
    skip: int = 0,
    gradient_alone: bool = False,
) -> list[str]:
    """Training on data that may be bad. Returns digests of all of this rank's state, after each step.

    Args:
        skip: batches that are left out before step 3.
        gradient_alone: what is bad has a loss that is finite.
    """
    digests: list[str] = []

    class Watched(Engine):
        def skipped(self) -> bool:
            digests.append(digest(self))
            return super().skipped()

    class Skipping(trainer.TokenStream):
        def __next__(self) -> torch.Tensor:
            if self._consumed == 3 * settings.batch:
                self._consumed += skip * settings.batch
            return super().__next__()

    trainer.Engine, trainer.TokenStream = Watched, Skipping
    Fragile.gradient_alone = gradient_alone
    if bf16:
        use_bf16()
    run(Fragile(make_student(make_teacher())), settings, shards, folder, zero)
    return digests
