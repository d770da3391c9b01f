"""A teacher on ranks that train nothing. Each answers the questions of some students of its node.

A student and its teacher rank share two process groups, beside their default worlds:

    questions   the tokens of a micro-batch, from host to host over gloo: an end that dies is noticed at once
    answers     the parts of the teacher's logits, from GPU to GPU over NCCL (without GPUs over gloo)

The order that starts the teacher holds all shapes. A teacher rank answers its students in turn, one question each. They
ask one micro-batch ahead (halo/training/look_ahead.py), so teacher and students work at the same time.

    first student                         teacher ranks (`serve`)
    store: order            ->            load the teacher
                            <-  ready
    question                ->            forward
                            <-  answer
    ...
    end of questions        ->            wait in the store for the word to leave
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from halo.accelerator import on_gpu
from halo.distributed import PATIENCE, SLOW_LIMIT, STEP_LIMIT, device, rank
from halo.errors import Stopped, UserError
from halo.models.build import build_head, empty_teacher
from halo.ranks import LEAVE, ORDER, RankLayout
from halo.stop import ignoring_stop_requests
from halo.teacher.batch import Batch, keep_for_current_stream
from halo.teacher.colocated import Teacher, teacher_model
from halo.teacher.logits import LogitsForm, TeacherLogits

CONNECT_LIMIT = timedelta(minutes=1)
"""How long a student and its teacher rank, both running, wait for each other to connect."""


class LinkEnd(IntEnum):
    """The ends of a link; the numbers are their ranks in its process groups."""

    STUDENT = 0
    TEACHER = 1


class Message(IntEnum):
    """The first number of a student's message; the tokens follow."""

    NO_MORE_QUESTIONS = 0
    QUESTION = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """The teacher that the students need, and the shape of their questions."""

    teacher: str
    """A folder or a GGUF file."""
    sharded: bool
    fp8: bool
    form: LogitsForm
    attention: str
    """The implementation of its attention (halo/models/attention.py)."""
    batch: int
    """B, the sequences of a question."""
    seq_len: int
    """T, the tokens of each."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Order":
        table = json.loads(text)
        return cls(**table | {"form": LogitsForm(**table["form"])})


class Link:
    """One end of the connection between a student and its teacher rank.

    A transfer under way needs its `dist.Work` and its tensors: whoever starts one keeps them until it is done.

    Args:
        student: the student's rank among students.
        end: this end.

    Raises, as every method does:
        UserError: the other end is gone, after some rank met a user's mistake.
        RuntimeError: the other end is gone, because it died.
    """

    def __init__(self, layout: RankLayout, student: int, end: LinkEnd):
        self._layout, self._peer = layout, LinkEnd(1 - end)
        self.broken = False
        """Whether the other end is gone."""
        store = dist.PrefixStore(f"halo/link/{student}", layout.store)
        self._questions: Any  # torch's type hints lack the methods of these groups
        with self._noticing_a_lost_peer():
            self._questions = dist.ProcessGroupGloo(dist.PrefixStore("questions", store), end, 2, CONNECT_LIMIT)
        self._answers = self._questions
        if on_gpu():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = SLOW_LIMIT
            self._answers = dist.ProcessGroupNCCL(dist.PrefixStore("answers", store), end, 2, options)

    def send_message(self, message: Tensor) -> Callable[[], None]:
        """Begin to send a tensor from host to host. Call the result to wait until it is sent."""
        with self._noticing_a_lost_peer():
            work = self._questions.send([message], self._peer, 0)

        def wait(message: Tensor = message) -> None:  # the tensor must live until then
            with self._noticing_a_lost_peer():
                work.wait(STEP_LIMIT)

        return wait

    def receive_message(self, message: Tensor) -> None:
        """Wait for a tensor from the other host, up to PATIENCE."""
        with self._noticing_a_lost_peer():
            self._questions.recv([message], self._peer, 0).wait(PATIENCE)

    def send_parts(self, parts: Sequence[Tensor]) -> None:
        """Send tensors of this device. Between GPUs the current stream waits until they are sent."""
        parts = [part.contiguous() for part in parts]
        with self._noticing_a_lost_peer():
            works = [self._answers.send([part], self._peer, 0) for part in parts]
        self._await(works, STEP_LIMIT)

    def receive_parts(self, parts: Sequence[Tensor]) -> Callable[[timedelta], None]:
        """Begin to receive into tensors of this device. Call the result to wait for them."""
        with self._noticing_a_lost_peer():
            works = [self._answers.recv([part], self._peer, 0) for part in parts]
        return lambda limit: self._await(works, limit)

    def _await(self, works: Sequence[dist.Work], limit: timedelta) -> None:
        """Between GPUs the current stream waits, not the host, and NCCL has its own limit."""
        with self._noticing_a_lost_peer():
            for work in works:
                if self._answers is self._questions:
                    work.wait(limit)
                else:
                    work.wait()

    def close(self) -> None:
        """Disconnect, once no transfer is under way at either end."""
        if self._answers is not self._questions:
            torch.cuda.synchronize()
            self._answers.shutdown()

    @contextmanager
    def _noticing_a_lost_peer(self) -> Iterator[None]:
        """Turn a failed transfer into an error that says which end is gone."""
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            if self._layout.met_error():
                raise UserError("another rank met an error") from error
            who = "the student" if self._peer == LinkEnd.STUDENT else "the teacher"
            raise RuntimeError(f"{who} at the other end of a link is gone") from error


class DedicatedTeacher:
    """A student's side of a teacher on other ranks. Every student makes one, and uses it as a context manager.

    Attributes:
        model: the teacher's shapes, without weights.
        ranks: how many ranks the teacher has.

    Raises:
        UserError: the teacher could not be loaded.
    """

    def __init__(self, layout: RankLayout, order: Order):
        teacher = Path(order.teacher)
        self.model = empty_teacher(teacher)
        self.ranks = layout.all_teachers
        self._order = order
        self._head = build_head(teacher) if order.form.kind == "factored" else None
        self._like = torch.empty(0, self.model.config.hidden_size, dtype=self.model.dtype, device=device())
        self._prefetched: Callable[[], TeacherLogits] | None = None
        self._limit = SLOW_LIMIT  # the first forward compiles
        if rank() == 0:
            layout.store.set(ORDER, order.to_json())
        self._link = Link(layout, rank(), LinkEnd.STUDENT)
        self._link.receive_message(torch.empty(1))
        self._link.receive_parts([torch.empty(1, device=device())])(SLOW_LIMIT)

    def prefetch(self, batch: Batch) -> None:
        """As `TeacherSource` has it."""
        assert self._prefetched is None, "one micro-batch at a time"
        parts = self._order.form.empty(batch.host_ids.numel(), self._like)
        received = self._link.receive_parts(parts)  # first: the answer must always have a receiver
        sent = self._link.send_message(torch.cat([torch.tensor([Message.QUESTION]), batch.host_ids.flatten()]))

        def answer() -> TeacherLogits:
            sent()
            received(self._limit)
            return self._order.form.assemble(parts, self._head)

        self._prefetched = answer

    def next(self) -> TeacherLogits:
        """As `TeacherSource` has it.

        Raises:
            UserError, RuntimeError: the teacher's rank is gone, as `Link` has it.
        """
        assert self._prefetched is not None, "nothing was prefetched"
        logits = self._prefetched()
        self._limit, self._prefetched = STEP_LIMIT, None
        keep_for_current_stream(logits.parts)
        return logits

    def __enter__(self) -> "DedicatedTeacher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Tell the teacher that no more questions come. If this rank failed, its end of the link tells that."""
        if self._link.broken or not (kind is None or issubclass(kind, UserError | Stopped)):
            return
        if self._prefetched is not None:
            self.next()
            if on_gpu():
                torch.cuda.synchronize()
        message = [Message.NO_MORE_QUESTIONS] * (1 + self._order.batch * self._order.seq_len)
        self._link.send_message(torch.tensor(message))()
        self._link.close()


def serve(layout: RankLayout) -> None:
    """The whole work of a teacher rank: wait for an order, answer questions until they end, wait for the word to leave.

    It ignores signals that ask to stop: the students save, and the teacher leaves with them.

    Raises:
        UserError: the teacher cannot be loaded, or another rank met a user's mistake.
        Stopped: the students were asked to stop, and have saved.
        RuntimeError: a student is gone.
    """
    with ignoring_stop_requests():
        if layout.wait_for(LEAVE, ORDER) == ORDER:
            _answer(layout, Order.from_json(layout.store.get(ORDER)))
            layout.wait_for(LEAVE)
    if layout.store.get(LEAVE) != b"0":
        raise Stopped("the students stopped")


@torch.no_grad()
def _answer(layout: RankLayout, order: Order) -> None:
    """Answer this rank's students in turn, until none has more questions."""
    links = [Link(layout, student, LinkEnd.TEACHER) for student in layout.answered_students()]
    source, attention = Path(order.teacher), order.attention
    teacher = Teacher(teacher_model(source, sharded=order.sharded, fp8=order.fp8, attention=attention), order.form)
    for link in links:
        link.send_message(torch.ones(1))()
        # NCCL connects at the first transfer, and each end waits there: not while the other waits for a question.
        link.send_parts([torch.ones(1, device=device())])
    while links:
        for link in list(links):
            message = torch.empty(1 + order.batch * order.seq_len, dtype=torch.int64, pin_memory=on_gpu())
            link.receive_message(message)
            if message[0] == Message.NO_MORE_QUESTIONS:
                links.remove(link)
                link.close()
            else:
                input_ids = message[1:].view(order.batch, order.seq_len).to(device(), non_blocking=True)
                link.send_parts(teacher.logits(input_ids).parts)
