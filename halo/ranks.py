"""Ranks of two kinds: a student's, which train, and a dedicated teacher's, which only answer them.

Each kind has a default world of its own, since DeepSpeed runs its collectives over the whole default world. On each
node the last ranks are the teacher's. What the kinds have to tell each other stands in the job's store:

    halo/order     what the teacher is to answer (halo/teacher/dedicated.py), from the first student
    halo/leave     that nothing more comes, and the status to end with, from the first student
    halo/errors    how many ranks met a user's mistake: all others end too
    halo/left/R    that rank R ends; the first student, which may hold the store, waits for that
"""

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from halo.config import Distill
from halo.distributed import PATIENCE
from halo.errors import UserError

ERRORS, ORDER, LEAVE, LEFT = "halo/errors", "halo/order", "halo/leave", "halo/left"
LOOK_EVERY = 0.2
"""Seconds between a waiting teacher's looks at the store."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a rank stands among all of a job. Ranks count node by node, and each node's as many.

    Attributes:
        store: which all ranks share.
        rank, size: this rank among all, and how many there are.
        per_node: of them on each node.
        teachers: of those, how many are a dedicated teacher's; 0: there is none.
    """

    store: dist.Store
    rank: int
    size: int
    per_node: int
    teachers: int = 0

    @property
    def students(self) -> int:
        """Of each node."""
        return self.per_node - self.teachers

    @property
    def all_teachers(self) -> int:
        """Ranks of the dedicated teacher on all nodes."""
        return self.size // self.per_node * self.teachers

    @property
    def is_teacher(self) -> bool:
        return self.rank % self.per_node >= self.students

    def asked_by(self) -> list[int]:
        """A teacher's: the students that it answers, all of its node, by their rank among students."""
        node, place = divmod(self.rank, self.per_node)
        first = node * self.students
        return [first + i for i in range(self.students) if i % self.teachers == place - self.students]

    def join(self, timeout: timedelta = PATIENCE) -> None:
        """Make the default world of this rank's kind, and have the environment say what DeepSpeed reads there."""
        kind, rank, size = "students", self.rank, self.size
        if self.teachers:
            node, place = divmod(self.rank, self.per_node)
            count, first = self.students, 0
            if self.is_teacher:
                kind, count, first = "teachers", self.teachers, self.students
            rank, size = node * count + place - first, self.size // self.per_node * count
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # LOCAL_RANK stays: it names the GPU
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = dist.PrefixStore(kind, self.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        dist.barrier()  # NCCL's ranks meet here, within the rendezvous' limit, and not while rank 0 works alone

    def dismiss(self, status: int) -> None:
        """A student's: tell the teacher's ranks to end with `status`, and see that they read it."""
        if self.teachers and self.rank == 0:
            self.store.set(LEAVE, str(status))
            teachers = [r for r in range(self.size) if r % self.per_node >= self.students]
            with contextlib.suppress(dist.DistError):  # one that is lost does not keep this one
                self.store.wait([f"{LEFT}/{r}" for r in teachers], timedelta(seconds=30))

    def leave(self) -> None:
        """A teacher's: tell that it ends."""
        self.store.set(f"{LEFT}/{self.rank}", "")

    def met_error(self) -> bool:
        """Whether some rank met a user's mistake."""
        return self.store.add(ERRORS, 0) > 0

    def wait_for(self, *names: str) -> str:
        """A teacher's: wait, for as long as it takes, until one of the names is in the store; which.

        Raises:
            UserError: a rank met one.
            DistError: the store is gone, and with it the first student.
        """
        while True:
            if self.met_error():
                raise UserError("another rank met an error")
            for name in names:
                if self.store.check([name]):
                    return name
            time.sleep(LOOK_EVERY)


def split_ranks(store: dist.Store, rank: int, size: int, distill: Distill | None) -> Split:
    """The ranks of a job, a dedicated teacher's among them if there is one.

    Args:
        distill: the settings of stage 2; None where the job does not run it.

    Raises:
        UserError: the ranks cannot be split so.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    teachers = distill.teacher_ranks if distill else 0
    if distill and teachers:
        students = per_node - teachers
        if size % per_node:
            raise UserError(f"a dedicated teacher needs as many ranks on every node, not {per_node} of {size} here")
        if students < 1:
            raise UserError(
                f"distill.teacher_ranks = {teachers} leaves no student among the {per_node} ranks of a node: "
                "start more ranks, or take fewer for the teacher"
            )
        if teachers > students:
            raise UserError(
                f"distill.teacher_ranks = {teachers} are more than the {students} ranks of a node that are left to ask "
                f"them, and some would be idle: take at most {per_node // 2}"
            )
        if distill.teacher_sharded and students % teachers:
            fit = min(
                (n for n in range(2, per_node // 2 + 1) if per_node % n == 0),
                key=lambda n: abs(n - teachers),
                default=None,
            )
            instead = "teacher_sharded = false" if fit is None else f"teacher_ranks = {fit}"
            raise UserError(
                f"a teacher sharded over {teachers} ranks answers {teachers} students at a time, which do not divide "
                f"the {students} of a node: set distill.{instead}"
            )
    return Split(store=store, rank=rank, size=size, per_node=per_node, teachers=teachers)
