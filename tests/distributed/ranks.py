"""Run a function on several gloo ranks, each in a process of its own, and get their results back."""

import os
import pickle  # not the pipe's own, which passes tensors as file handles that end with their process
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from halo.config import Distill
from halo.ranks import RankLayout, split_ranks
from halo.teacher.dedicated import serve

# A server that has imported everything once forks the ranks: importing it takes longer than most jobs.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120, split: Distill | None = None
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo world and return each rank's result, by rank.

    `split`, settings of stage 2, may make some ranks a dedicated teacher's: they serve, and their result is None. The
    others get their `RankLayout` as one more argument.

    `function` must be importable (a module's own), and arguments and results picklable.

    Raises:
        Whatever the first rank to fail raised, with its rank and traceback as a note; TimeoutError after `timeout`
        seconds; RuntimeError where a rank's process died. The other ranks are ended.
    """
    # The parent holds the store, so that its port is free for certain.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        CONTEXT.Process(
            target=_rank,
            args=(rank, world_size, store.port, pipes[rank][1], timeout, function, args, split),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # the child's copy is the only one left: the pipe ends when the child does
        return _collect({receiver: rank for rank, (receiver, _) in enumerate(pipes)}, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(ranks: dict[Connection, int], timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    deadline = time.monotonic() + timeout
    pending = set(ranks)
    while pending:
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(ranks[receiver] for receiver in pending)
            raise TimeoutError(f"ranks {late} gave no result within {timeout} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                result, error = pickle.loads(receiver.recv_bytes())
            except EOFError as eof:
                raise RuntimeError(f"rank {ranks[receiver]} died without a result") from eof
            if error is not None:
                raise error
            results[ranks[receiver]] = result
            pending.remove(receiver)
    return results


def _rank(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: Any,
    settings: Distill | None,
) -> None:
    split = join(rank, world_size, port, timedelta(seconds=timeout), settings)
    try:
        if split.is_teacher:
            result = serve(split)
            split.leave()
        else:
            result = function(*args, *([split] if settings else []))
            split.dismiss(0)
        sender.send_bytes(pickle.dumps((result, None)))
    except Exception as error:
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        sender.send_bytes(pickle.dumps((None, error)))
        time.sleep(timeout)  # stay until the parent ends all: no other rank shall fail for want of this one
    dist.destroy_process_group()


def join(rank: int, world_size: int, port: int, timeout: timedelta, settings: Distill | None = None) -> RankLayout:
    """Make this process a rank of a gloo world with its store at `port`; a dedicated teacher makes it two worlds."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and missed where one is killed
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    split = split_ranks(store, rank, world_size, settings)
    split.join(timeout)
    return split
