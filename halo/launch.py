"""What every launcher does once its command line is read: join the ranks, run, and end all ranks together.

Works under `deepspeed`, torchrun, srun with torchrun, and as a plain `python launcher/x.py`.
"""

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from halo.accelerator import check_gpu
from halo.errors import EXIT_USER_ERROR, Stopped, UserError, in_one_line
from halo.job import Job
from halo.ranks import ERRORS, LEFT, split_ranks
from halo.stop import watch_launcher
from halo.teacher.dedicated import serve
from halo.training.tuning import report_tuning, tune_once

EXIT_FAILED = 1
"""The status after any other exception, as Python has it."""
EXIT_SAVED = 75
"""The status after a signal asked the run to stop and it saved its state. The same command resumes."""
RENDEZVOUS = timedelta(minutes=30)
"""How long a rank waits for all others to start."""


def run_job(work: Callable[[Job], object], job: Job | UserError) -> NoReturn:
    """Join the ranks, call `work(job)`, leave. Ranks of a dedicated teacher serve it instead.

    A UserError, or what the system refuses, ends every rank: the first rank to meet it prints one line, and each exits
    with status 2. Stopped ends every rank too, with status 75: all raise it, at one step. GPUs that torch cannot use
    are a user's mistake (`check_gpu`). Any other exception ends this rank with its traceback and status 1.

    It never returns, and leaves the interpreter's own end out: a thread may still write a checkpoint, and if Python
    takes it down amid C++, the process aborts (SIGABRT) after its work is done.

    Args:
        job: the command line; or what was wrong with it, for all ranks to end together.
    """
    try:
        check_gpu()
    except UserError as error:
        job = job if isinstance(job, UserError) else error
    warnings.filterwarnings("ignore", category=FutureWarning)
    alone = "RANK" not in os.environ
    if not alone:
        watch_launcher()
    _fill_environment()
    store, rank, world_size = (
        (dist.HashStore(), 0, 1) if alone else next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS)))
    )
    status = 0
    try:
        with in_one_line():
            if isinstance(job, UserError):
                raise job
            split = split_ranks(store, rank, world_size, job.config.distill if "distill" in job.stages else None)
            split.join()
            tune_once()
            if split.is_teacher:
                serve(split)
            else:
                work(replace(job, split=split))
                report_tuning()
    except UserError as error:
        if store.add(ERRORS, 1) == 1:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(store, rank, world_size)
    except Stopped as stopped:
        status = EXIT_SAVED
        if rank == 0:
            print(f"{stopped}: the same command resumes", flush=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        _end(EXIT_FAILED)
    dist.destroy_process_group()
    if split.is_teacher:
        split.leave()
    else:
        split.dismiss(status)
    atexit._run_exitfuncs()
    _end(status)


def _fill_environment() -> None:
    """Set the variables that are missing: a plain python sets none, DeepSpeed sets LOCAL_SIZE for LOCAL_WORLD_SIZE.

    A rank alone meets no others: what its libraries open all the same listens on this machine only.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        if sys.platform == "linux":
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])


def _leave(store: dist.Store, rank: int, world_size: int) -> NoReturn:
    """End this rank. Rank 0 may hold the store: it waits a moment, so that the others see that the line is printed."""
    if rank != 0:
        store.set(f"{LEFT}/{rank}", "")
    elif world_size > 1:
        with contextlib.suppress(dist.DistError):
            store.wait([f"{LEFT}/{r}" for r in range(1, world_size)], timedelta(seconds=5))
    _end(EXIT_USER_ERROR)


def _end(status: int) -> NoReturn:
    """End this process at once. After an error not even exit handlers run: one might wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
