"""A teacher on ranks of its own, which answer the students' questions.

A student and the rank of its node that answers it share two process groups, beside both default worlds:

    questions   a micro-batch's tokens, host to host, over gloo: who waits here notices at once that the other is gone
    answers     the parts of the teacher's logits, over NCCL from GPU to GPU (without GPUs over gloo)

Shapes are told once, in the order that starts the teacher. A teacher's rank takes its students in turn, a question
each. They ask one micro-batch ahead (halo/training/look_ahead.py): teacher and students work at the same time.

    first student                         teacher's ranks (`serve`)
    store: order            ->            load the teacher
                            <-  ready
    question                ->            forward
                            <-  answer
    ...
    end                     ->            wait for another word: to leave
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from halo.distributed import PATIENCE, SLOW_LIMIT, STEP_LIMIT, device, rank
from halo.errors import Stopped, UserError
from halo.models.build import build_head, build_teacher, empty_teacher
from halo.ranks import LEAVE, ORDER, Split
from halo.stop import ignoring_stop_requests
from halo.teacher.colocated import Teacher, teacher_group, used_here
from halo.teacher.logits import LogitsForm, TeacherLogits

MEETING = timedelta(minutes=1)
"""How long a student and its teacher wait for each other, both being up, to connect."""
STUDENT, TEACHER = 0, 1
END, QUESTION = 0, 1
"""What a message from a student begins with; the tokens follow."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the teacher is to do."""

    teacher: str
    """Its folder or file."""
    sharded: bool
    form: LogitsForm
    batch: int
    seq_len: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Order":
        table = json.loads(text)
        return cls(**table | {"form": LogitsForm(**table["form"])})


class Link:
    """One end of what connects a student with its teacher.

    A transfer that is under way needs its `dist.Work` and its tensors: whoever starts one keeps them until it is done.

    Args:
        student: its rank among students.
        end: STUDENT or TEACHER.
    """

    def __init__(self, split: Split, student: int, end: int):
        self._split, self._peer = split, 1 - end
        self.broken = False
        """Whether the other end is gone."""
        store = dist.PrefixStore(f"halo/link/{student}", split.store)
        self._questions: Any  # torch's type hints do not know what these groups can do
        with self._noticing():
            self._questions = dist.ProcessGroupGloo(dist.PrefixStore("questions", store), end, 2, MEETING)
        self._answers = self._questions
        if torch.cuda.is_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = SLOW_LIMIT
            self._answers = dist.ProcessGroupNCCL(dist.PrefixStore("answers", store), end, 2, options)

    def tell(self, message: Tensor) -> Callable[[], None]:
        """Begin to send a tensor from host to host. Call the result once it must have gone."""
        with self._noticing():
            work = self._questions.send([message], self._peer, 0)

        def wait(message: Tensor = message) -> None:  # the tensor lives until then
            with self._noticing():
                work.wait(STEP_LIMIT)

        return wait

    def hear(self, message: Tensor) -> None:
        """Wait for a tensor from the other host, for as long as it takes."""
        with self._noticing():
            self._questions.recv([message], self._peer, 0).wait(PATIENCE)

    def answer(self, parts: Sequence[Tensor]) -> None:
        """Send tensors of this device. Between GPUs the current stream waits until they have gone."""
        parts = [part.contiguous() for part in parts]
        with self._noticing():
            works = [self._answers.send([part], self._peer, 0) for part in parts]
        self._await(works, STEP_LIMIT)

    def listen(self, parts: Sequence[Tensor]) -> Callable[[timedelta], None]:
        """Begin to receive into tensors of this device. Call the result to wait for them."""
        with self._noticing():
            works = [self._answers.recv([part], self._peer, 0) for part in parts]
        return lambda limit: self._await(works, limit)

    def _await(self, works: Sequence[dist.Work], limit: timedelta) -> None:
        """Between GPUs it is the current stream that waits, not the host; NCCL has its own limit."""
        with self._noticing():
            for work in works:
                if self._answers is self._questions:
                    work.wait(limit)
                else:
                    work.wait()

    def close(self) -> None:
        """Once nothing is under way at either end."""
        if self._answers is not self._questions:
            torch.cuda.synchronize()
            self._answers.shutdown()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Where the other end is gone: because of a user's mistake that it has told, or because it died.

        Raises:
            UserError, RuntimeError: the one or the other.
        """
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            if self._split.met_error():
                raise UserError("another rank met an error") from error
            who = "the student" if self._peer == STUDENT else "the teacher"
            raise RuntimeError(f"{who} at the other end of a link is gone") from error


class DedicatedTeacher:
    """A student's side of a teacher on other ranks. Every student's rank makes one, and leaves it as a context.

    Attributes:
        model: the teacher's shapes, without weights.
        ranks: how many the teacher has.

    Raises:
        UserError: the teacher could not be loaded.
    """

    def __init__(self, split: Split, order: Order):
        teacher = Path(order.teacher)
        self.model = empty_teacher(teacher)
        self.ranks = split.all_teachers
        self._order = order
        self._head = build_head(teacher) if order.form.kind == "factored" else None
        self._like = torch.empty(0, self.model.config.hidden_size, dtype=self.model.dtype, device=device())
        self._pending: Callable[[], TeacherLogits] | None = None
        self._limit = SLOW_LIMIT  # the first forward compiles
        if rank() == 0:
            split.store.set(ORDER, order.to_json())
        self._link = Link(split, rank(), STUDENT)
        self._link.hear(torch.empty(1))
        self._link.listen([torch.empty(1, device=device())])(SLOW_LIMIT)

    def ask(self, input_ids: Tensor) -> Callable[[], TeacherLogits]:
        """Ask about [B, T] tokens on the host. Call the result for their logits, before asking again."""
        parts = self._order.form.empty(input_ids.numel(), self._like)
        received = self._link.listen(parts)  # first: an answer always finds room
        told = self._link.tell(torch.cat([torch.tensor([QUESTION]), input_ids.flatten()]))

        def answer() -> TeacherLogits:
            told()
            received(self._limit)
            self._limit, self._pending = STEP_LIMIT, None
            return used_here(self._order.form.assemble(parts, self._head))

        self._pending = answer
        return answer

    def __enter__(self) -> "DedicatedTeacher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Tell the teacher that there are no more questions. Where this rank fails, its end tells."""
        if self._link.broken or not (kind is None or issubclass(kind, UserError | Stopped)):
            return
        if self._pending is not None:
            self._pending()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._link.tell(torch.tensor([END] * (1 + self._order.batch * self._order.seq_len)))()
        self._link.close()


def serve(split: Split) -> None:
    """All that a dedicated teacher's rank does: wait for an order, answer questions until their end, wait to leave.

    Signals that ask to stop are the students' matter: they save, and the teacher leaves with them.

    Raises:
        UserError: the teacher cannot be loaded, or another rank met one.
        Stopped: the students were asked to stop, and have saved.
        RuntimeError: a student is gone.
    """
    with ignoring_stop_requests():
        if split.wait_for(LEAVE, ORDER) == ORDER:
            _answer(split, Order.from_json(split.store.get(ORDER)))
            split.wait_for(LEAVE)
    if split.store.get(LEAVE) != b"0":
        raise Stopped("the students stopped")


@torch.no_grad()
def _answer(split: Split, order: Order) -> None:
    """Answer this rank's students, in turn, until each has said that it has no more questions."""
    links = [Link(split, student, TEACHER) for student in split.asked_by()]
    teacher = Teacher(build_teacher(Path(order.teacher), teacher_group(order.sharded)), order.form)
    for link in links:
        link.tell(torch.ones(1))()
        # NCCL connects at the first transfer, where each end waits for the other: not while one waits for a question.
        link.answer([torch.ones(1, device=device())])
    while links:
        for link in list(links):
            message = torch.empty(
                1 + order.batch * order.seq_len, dtype=torch.int64, pin_memory=torch.cuda.is_available()
            )
            link.hear(message)
            if message[0] == END:
                links.remove(link)
                link.close()
            else:
                link.answer(teacher.logits(message[1:].view(order.batch, order.seq_len)).parts)
