"""A plain process is a rank alone: nothing of it listens to other machines."""

import ipaddress
import os
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from halo.distributed import all_sum, on_rank0, rank, world_size
from halo.job import Job
from halo.launch import run_job
from halo.preset import load_config
from tests.distributed.ranks import CONTEXT


def alone(sender: Connection) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)

    def work(job: Job) -> None:
        total = all_sum(torch.ones(2)).tolist()
        on_rank0(str)
        open_now = psutil.Process().net_connections(kind="inet")
        sender.send((rank(), world_size(), total, [c.laddr.ip for c in open_now if c.status == psutil.CONN_LISTEN]))

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
