"""Kill a training run again and again, and see that its end shows nothing of it.

    python -m tests.distributed.soak --steps 60 --kills 20

Stage 2 of a tiny hybrid on two ranks under ZeRO-3. At random moments of a run (while it starts or resumes, in a step,
in each part of saving) one rank or both get SIGKILL. A rank that is left must end by itself, with an error, within a
minute. Then the same command resumes the run. In the end every loss in metrics.jsonl and every weight must be, bit for
bit, those of a run that was not killed.

Such a small model is saved in no time. So each part of saving begins with a short sleep, and some kills hit it.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from halo.data.shards import write_shards
from halo.distributed import PATIENCE, rank
from halo.training import background
from halo.training.checkpoint import Checkpoints
from halo.training.engine import Engine
from tests.distributed import jobs
from tests.distributed.ranks import CONTEXT, join

RANKS = 2
SECONDS_TO_END = 60.0
TRIES = 10
"""How many runs in a row may end before the moment of a kill is noticed, on a busy machine."""
SLEEP = 0.05
"""Seconds by which each part of saving is longer. Each file that is written is a part: three on each rank."""
LONGEST_DELAY = {"start": 1.0, "step": 0.15, "snapshot": SLEEP, "write": 3 * SLEEP, "publish": SLEEP}
"""The seconds that a start, a step, and each part of saving take, roughly."""
SAVING = ("snapshot", "write", "publish")


@dataclass(frozen=True)
class Kill:
    """When which ranks are killed: `delay` seconds after `moment`."""

    moment: str
    """`start` (of resuming), the end of step `step`, or the beginning of a part of saving after it, on rank 0."""
    step: int
    delay: float
    victims: tuple[int, ...]

    def __str__(self) -> str:
        when = {"start": "it began to resume", "step": f"step {self.step}"}
        when |= {part: f"the beginning of a {part} after step {self.step}" for part in SAVING}
        return f"rank {' and '.join(map(str, self.victims))} {self.delay:.2f} s after {when[self.moment]}"


def plan(steps: int, kills: int, seed: int) -> list[Kill]:
    """All moments in turn, at random steps in rising order: the run makes progress between them."""
    choose = random.Random(seed)
    moments = cycle(("step", "write", "start", "publish", "snapshot"))
    victims = cycle(((0, 1), (0,), (1,)))
    return [
        Kill(moment, step, choose.uniform(0, LONGEST_DELAY[moment]), next(victims))
        for moment, step in zip(moments, sorted(choose.sample(range(steps - 4), kills)), strict=False)
    ]


def soak(folder: Path, *, steps: int, kills: int, seed: int, save_every: int = 3) -> None:
    """Raises:
    AssertionError: the run that was killed differs from the one that was not, or a rank did not end.
    """
    settings = jobs.training(steps=steps, save_every=save_every, micro_batch=4)
    shards = folder / "shards"
    write_shards(shards, np.random.default_rng(0).integers(0, 64, (60, 16)).astype(np.uint16), {"tokenizer": "none"})
    whole, killed = folder / "whole", folder / "killed"
    for ended in _wait(_start(shards, whole, settings)):
        assert ended == 0, f"a rank that nobody killed ended with {ended}: see {whole / 'rank-*.log'}"
    amid = 0
    for kill in plan(steps, kills, seed):
        for _ in range(TRIES):
            began, processes = time.time(), _start(shards, killed, settings)
            if _await(kill, killed, processes, began):
                break
            print(f"over before it was killed, begun anew: {kill}", flush=True)
            _compare(whole, killed, _wait(processes))
            shutil.rmtree(killed)
        else:
            raise AssertionError(f"{TRIES} runs in a row were over before they were killed: {kill}")
        saving = any(_after(killed / part, began) for part in SAVING)
        for victim in kill.victims:
            processes[victim].kill()
        amid += saving
        began = time.monotonic()
        for ended in _wait(processes, SECONDS_TO_END):
            assert ended != 0, "a rank ended well beside one that was killed"
        note = ", amid saving" if saving else ""
        print(f"killed {kill}{note}; all ended within {time.monotonic() - began:.1f} s", flush=True)
    tensors = _compare(whole, killed, _wait(_start(shards, killed, settings)))
    print(f"{amid} of {kills} kills met the ranks amid saving", flush=True)
    print(f"{steps} losses and {tensors} weights are bit for bit those of a run without kills", flush=True)


def _compare(whole: Path, killed: Path, statuses: Iterable[int | None]) -> int:
    """Compare a finished run with the one that was not killed. Returns the number of weights."""
    for ended in statuses:
        assert ended == 0, f"the run could not resume: see {killed / 'rank-*.log'}"
    assert jobs.losses(killed) == jobs.losses(whole), "other losses"
    weights = [torch.load(run / "weights.pt") for run in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), f"other weights: {name}"
    return len(weights[0])


def _start(shards: Path, folder: Path, settings: jobs.Training) -> list[BaseProcess]:
    folder.mkdir(exist_ok=True)
    # This process holds the store, so that its port is free for certain.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=_rank, args=(rank, store.port, shards, folder, settings), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
        process.store = store  # type: ignore[attr-defined]  # it lives as long as they do
    return processes


def _rank(rank_here: int, port: int, shards: Path, folder: Path, settings: jobs.Distill) -> None:
    log = os.open(folder / f"rank-{rank_here}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    join(rank_here, RANKS, port, PATIENCE)
    Checkpoints.resume = _marked("start", folder, Checkpoints.resume)  # type: ignore[method-assign]
    Engine.snapshot = _marked("snapshot", folder, Engine.snapshot)  # type: ignore[method-assign]
    background.write_tensors = _marked("write", folder, background.write_tensors)
    Checkpoints._make_latest = _marked("publish", folder, Checkpoints._make_latest)  # type: ignore[method-assign]
    result = jobs.distill(shards, folder, "zero3.json", settings)
    if rank() == 0:
        torch.save(result.weights, folder / "weights.pt")
    dist.destroy_process_group()


def _marked(part: str, folder: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, longer by a sleep, and on rank 0 with a file named after it that is there as long as it runs."""

    def marked(*args: Any) -> Any:
        if rank() == 0:
            (folder / part).touch()
        time.sleep(SLEEP)
        try:
            return function(*args)
        finally:
            if rank() == 0:
                (folder / part).unlink()

    return marked


def _await(kill: Kill, folder: Path, processes: list[BaseProcess], began: float) -> bool:
    """Wait for the moment of a kill. False: the run was over before."""
    while not _has_come(kill, folder, began):
        if not any(process.is_alive() for process in processes):
            return False
        time.sleep(0.002)
    time.sleep(kill.delay)
    return any(process.is_alive() for process in processes)


def _has_come(kill: Kill, folder: Path, began: float) -> bool:
    # What an earlier, killed process left does not count.
    if kill.moment == "start":
        # Not before: a rank that dies while the groups are made leaves others waiting, whom a launcher ends.
        return _after(folder / "start", began)
    metrics = folder / "metrics.jsonl"
    if not (_after(metrics, began) and len(metrics.read_bytes().splitlines()) > kill.step):
        return False
    return kill.moment == "step" or _after(folder / kill.moment, began)


def _after(path: Path, began: float) -> bool:
    try:
        return path.stat().st_mtime > began
    except FileNotFoundError:
        return False


def _wait(processes: list[BaseProcess], seconds: float | None = None) -> Iterator[int | None]:
    """The exit codes. A run may take its time; ranks beside a killed one have `seconds` to end."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, f"process {process.pid} did not end"
        yield process.exitcode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1000), help="of the moments; printed")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), **vars(arguments))
