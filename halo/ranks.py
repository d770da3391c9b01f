"""Which ranks train (students), and which only answer them (a dedicated teacher's).

Students and teachers have a default world each, since DeepSpeed runs its collectives over the whole default world. The
last ranks of each node are the teacher's. All ranks of a job share a store, through which they tell each other:

    halo/order     what the teacher must supply (halo/teacher/dedicated.py), from the first student
    halo/leave     nothing more comes, and the exit status, from the first student
    halo/errors    how many ranks met a user's mistake: all others end too
    halo/left/R    rank R ends; the first student waits for that, since its process may hold the store
"""

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from halo.accelerator import on_gpu
from halo.config import Distill
from halo.distributed import PATIENCE
from halo.errors import UserError

ERRORS, ORDER, LEAVE, LEFT = "halo/errors", "halo/order", "halo/leave", "halo/left"
POLL_EVERY = 0.2
"""Seconds between two looks at the store of a waiting teacher."""


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """The ranks of a job, node by node, and which of them this one is. Every node has the same number of ranks.

    Attributes:
        store: shared by all ranks.
        rank, size: this rank among all, and the number of all.
        per_node: ranks on each node.
        teachers: how many of them are a dedicated teacher's; 0: there is none.
    """

    store: dist.Store
    rank: int
    size: int
    per_node: int
    teachers: int = 0

    @property
    def students(self) -> int:
        """On each node."""
        return self.per_node - self.teachers

    @property
    def all_teachers(self) -> int:
        """Teacher ranks on all nodes."""
        return self.size // self.per_node * self.teachers

    @property
    def is_teacher(self) -> bool:
        return self.rank % self.per_node >= self.students

    def answered_students(self) -> list[int]:
        """The students on its node that this teacher rank answers, by their ranks among students."""
        node, place = divmod(self.rank, self.per_node)
        first = node * self.students
        return [first + i for i in range(self.students) if i % self.teachers == place - self.students]

    def join(self, timeout: timedelta = PATIENCE) -> None:
        """Make the default world, of students or of teachers, and set the variables that DeepSpeed reads.

        Args:
            timeout: how long a collective waits for a rank.
        """
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
        if on_gpu():
            backend = "nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store = dist.PrefixStore(kind, self.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        dist.barrier()  # NCCL connects at the first collective, and has a limit for that: not while rank 0 works alone

    def dismiss(self, status: int) -> None:
        """Called by a student that ends. The first asks teacher ranks to end with `status`, and waits for all others.

        Its process may hold the store: a rank that still leaves its group when the store goes is aborted.
        """
        if self.rank != 0:
            self.leave()
        elif self.size > 1:
            if self.teachers:
                self.store.set(LEAVE, str(status))
            with contextlib.suppress(dist.DistError):  # a rank that died must not hold this one
                self.store.wait([f"{LEFT}/{r}" for r in range(1, self.size)], timedelta(seconds=30))

    def leave(self) -> None:
        """Reports that this rank ends."""
        self.store.set(f"{LEFT}/{self.rank}", "")

    def met_error(self) -> bool:
        """Whether some rank met a user's mistake."""
        return self.store.add(ERRORS, 0) > 0

    def wait_for(self, *names: str) -> str:
        """Called by a teacher rank: waits, without a limit, until one of the names is in the store. Returns that name.

        Raises:
            UserError: another rank met a user's mistake.
            DistError: the store is gone, and with it the first student.
        """
        while True:
            if self.met_error():
                raise UserError("another rank met an error")
            for name in names:
                if self.store.check([name]):
                    return name
            time.sleep(POLL_EVERY)


def split_ranks(store: dist.Store, rank: int, size: int, distill: Distill | None) -> RankLayout:
    """The layout of a job's ranks, with those of a dedicated teacher if the settings ask for one.

    Args:
        distill: the settings of stage 2. None: the job does not run it.

    Raises:
        UserError: the ranks cannot be divided in this way.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    teachers = distill.teacher_ranks if distill else 0
    if distill and teachers:
        _check_teacher_ranks(distill, per_node, size)
    return RankLayout(store=store, rank=rank, size=size, per_node=per_node, teachers=teachers)


def _check_teacher_ranks(distill: Distill, per_node: int, size: int) -> None:
    teachers, students = distill.teacher_ranks, per_node - distill.teacher_ranks
    if size % per_node:
        raise UserError(
            f"a dedicated teacher needs the same number of ranks on every node, not {per_node} of {size} here"
        )
    if students < 1:
        raise UserError(
            f"distill.teacher_ranks = {teachers} leaves no student among the {per_node} ranks of a node: "
            "start more ranks, or give the teacher fewer"
        )
    if teachers > students:
        raise UserError(
            f"distill.teacher_ranks = {teachers} is more than the {students} students of a node, and some teacher "
            f"ranks would be idle: use at most {per_node // 2}"
        )
    if distill.teacher_sharded and students % teachers:
        fit = [n for n in range(2, per_node // 2 + 1) if per_node % n == 0]
        nearest = min(fit, key=lambda n: abs(n - teachers), default=None)
        instead = "teacher_sharded = false" if nearest is None else f"teacher_ranks = {nearest}"
        raise UserError(
            f"a teacher sharded over {teachers} ranks answers {teachers} students at a time, which do not divide "
            f"the {students} of a node: set distill.{instead}"
        )
