"""One micro-batch ahead of the student: drawn, on its way to the GPU, and the teacher asked about it.

    ask    begins what the teacher has to say of the next micro-batch, while the GPU still works on the student's last
    take   hands both to the student

On a GPU all of that runs in a stream of its own, which waits for nothing of the student's: the teacher's forward and
the student's work share the GPU. Only `take` makes the student's stream wait, for what is not there yet.

The stream's position that a checkpoint holds is the one before what was drawn ahead: a run that goes on asks again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halo.data.stream import TokenStream
from halo.distributed import device
from halo.training.metrics import Metrics

Answer = Callable[[], dict[str, Any]]
"""What the loss needs from the teacher, as its keywords. Call it in the student's stream, which then waits for it."""


@dataclass(frozen=True)
class _Asked:
    input_ids: Tensor
    answer: Answer
    position: dict[str, Any]
    """Of the stream, before it."""


class LookAhead:
    """The micro-batches of a stream with the teacher's answers.

    Args:
        stream: of int64 [B, T] tokens.
        ask: [B, T] tokens on the host -> the answer (`Objective.ask`).
    """

    def __init__(self, stream: TokenStream, ask: Callable[[Tensor], Answer]):
        self._tokens, self._ask = stream, ask
        self._asked: _Asked | None = None
        self._aside = torch.cuda.Stream() if torch.cuda.is_available() else None
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream())  # the teacher's weights are on their way

    def position(self) -> dict[str, Any]:
        """Where the stream stands for a run that goes on from here."""
        return self._tokens.state_dict() if self._asked is None else self._asked.position

    def ask(self, metrics: Metrics) -> None:
        """Draw the next micro-batch and ask the teacher about it. Nothing waits for the answer."""
        position = self._tokens.state_dict()
        with metrics.waiting("data"):
            on_host = next(self._tokens)
            if self._aside is not None:
                on_host = on_host.pin_memory()
        with metrics.waiting("teacher"), self._in_stream():
            input_ids = on_host.to(device(), non_blocking=True)
            self._asked = _Asked(input_ids, self._ask(on_host), position)

    def take(self, metrics: Metrics) -> dict[str, Any]:
        """The objective's arguments for the next micro-batch: its tokens, and what the teacher says of them."""
        if self._asked is None:
            self.ask(metrics)
        assert self._asked is not None
        asked, self._asked = self._asked, None
        with metrics.waiting("teacher"):
            if self._aside is not None:
                torch.cuda.current_stream().wait_stream(self._aside)
                asked.input_ids.record_stream(torch.cuda.current_stream())
            return {"input_ids": asked.input_ids, **asked.answer()}

    def _in_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._aside is None else torch.cuda.stream(self._aside)
