"""One micro-batch ahead of the student: it is drawn, copied to the GPU, and the teacher begins to work on it.

    prefetch    begins all that for the next micro-batch, while the GPU still works on the student's last one
    next        gives that micro-batch, with the teacher's logits, to the student

On a GPU this runs in a stream of its own. `next` makes the student's stream wait for what is not ready yet. A teacher
on the same GPU may begin when the student's backward is done (`after_backward`): its matrix products then run beside
the optimizer's step, which waits for memory, and not beside other products, which would only become slower. Under
ZeRO-3 it begins at once, and fills the time in which the student waits for its weights (docs/performance.md). A teacher
on other ranks is asked at once too.

A checkpoint holds the stream's position before the micro-batch that was prefetched: a run that resumes draws it again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from halo.accelerator import on_gpu
from halo.data.stream import TokenStream
from halo.distributed import device
from halo.teacher.batch import Batch
from halo.teacher.colocated import TeacherSource
from halo.training.metrics import Metrics


@dataclass(frozen=True)
class _Prefetched:
    batch: Batch
    position: dict[str, Any]
    """The stream's, before the batch was drawn."""


class LookAhead(Iterator[Batch]):
    """The micro-batches of a stream, on this rank's device.

    Args:
        stream: of [B, T] int64 tokens on the host.
        metrics: where the seconds of waiting go: `data_wait_s` and `teacher_wait_s`.
        teacher: supplies each batch's `teacher_logits`. None: they stay None.
        separator: the token that ends a document, where documents are isolated. None: they are not.
        after_backward: whether a teacher on this GPU waits for what the student's stream has at `prefetch`.
    """

    def __init__(
        self,
        stream: TokenStream,
        metrics: Metrics,
        teacher: TeacherSource | None = None,
        separator: int | None = None,
        *,
        after_backward: bool = False,
    ):
        self._stream, self._metrics = stream, metrics
        self._teacher, self._separator = teacher, separator
        self._after_backward = after_backward and teacher is not None and not teacher.ranks
        self._prefetched: _Prefetched | None = None
        self._side_stream = torch.cuda.Stream() if on_gpu() else None

    def position(self) -> dict[str, Any]:
        """The stream's position for a run that resumes from here."""
        return self._stream.state_dict() if self._prefetched is None else self._prefetched.position

    def prefetch(self) -> None:
        """Draw the next micro-batch and begin the teacher's work on it. Nothing waits for that."""
        position = self._stream.state_dict()
        with self._metrics.waiting("data"):
            batch = Batch.on_host(next(self._stream), self._separator)
        if self._after_backward and self._side_stream is not None:
            self._side_stream.wait_stream(torch.cuda.current_stream())
        with self._metrics.waiting("teacher"), self._in_side_stream():
            batch = batch.to(device())
            if self._teacher is not None:
                self._teacher.prefetch(batch)
        self._prefetched = _Prefetched(batch, position)

    def __next__(self) -> Batch:
        """The next micro-batch, in the current stream."""
        if self._prefetched is None:
            self.prefetch()
        assert self._prefetched is not None
        batch, self._prefetched = self._prefetched.batch, None
        with self._metrics.waiting("teacher"):
            if self._side_stream is not None:
                torch.cuda.current_stream().wait_stream(self._side_stream)
                batch.keep_for_current_stream()
            return batch if self._teacher is None else replace(batch, teacher_logits=self._teacher.next())

    def _in_side_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._side_stream is None else torch.cuda.stream(self._side_stream)
