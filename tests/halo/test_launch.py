"""How a process joins, alone, and how it ends."""

import io
import ipaddress
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch

from halo.distributed import all_sum, on_rank0, rank, world_size
from halo.errors import EXIT_USER_ERROR, Stopped, UserError
from halo.job import Job
from halo.launch import EXIT_FAILED, EXIT_SAVED, run_job
from halo.preset import load_config
from tests.distributed.ranks import CONTEXT
from tests.launcher.conftest import ROOT

ENDS: dict[str, tuple[Exception | None, int]] = {
    "done": (None, 0),
    "stopped": (Stopped("saved"), EXIT_SAVED),
    "mistake": (UserError("no"), EXIT_USER_ERROR),
    "failure": (KeyError("x"), EXIT_FAILED),
}
"""What ends a run, and its status."""


def alone(sender: Connection) -> None:
    def work(job: Job) -> None:
        total = all_sum(torch.ones(2)).tolist()
        on_rank0(str)
        open_now = psutil.Process().net_connections(kind="inet")
        sender.send((rank(), world_size(), total, [c.laddr.ip for c in open_now if c.status == psutil.CONN_LISTEN]))

    run_alone(work)


def run_alone(work: Callable[[Job], object]) -> NoReturn:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    run_job(work, Job(config=load_config("tiny"), run=Path("none"), ds_config=Path("none"), stages=()))


def test_a_rank_alone_listens_to_this_machine_only() -> None:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=alone, args=(sender,))
    process.start()
    sender.close()
    *found, addresses = receiver.recv()
    process.join()
    assert (process.exitcode, found) == (0, [0, 1, [1.0, 1.0]])
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses


def saving_for_ever(end: str) -> None:
    """Ends while threads write: Python aborts a process that it takes such a thread down in."""

    def save() -> None:
        while True:
            torch.save({i: torch.ones(100) for i in range(200)}, io.BytesIO())
            begun.set()

    begun = threading.Event()

    def work(_: Job) -> None:
        for _ in range(4):
            threading.Thread(target=save, daemon=True).start()
        begun.wait()
        error, _ = ENDS[end]
        if error is not None:
            raise error

    run_alone(work)


@pytest.mark.parametrize("end", ENDS)
def test_threads_that_are_at_work_at_the_end_do_not_change_the_status(end: str) -> None:
    code = f"from tests.halo.test_launch import saving_for_ever; saving_for_ever({end!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)  # a forked process would end in another way
    assert done.returncode == ENDS[end][1]
