"""Kill a preparation of shards again and again, and see that its end shows nothing of it.

    python -m tests.halo.data.soak_preparation --kills 20

At random moments (while it starts, while pieces are written, while the end is put together) a preparation, one of its
tasks, or one of its workers gets SIGKILL. The same call then resumes, with other numbers of workers and tasks each
time. In the end every file must be that of a preparation that nobody killed, bit for bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from halo.data.packing import Part
from halo.data.preparation import prepare
from halo.errors import UserError
from halo.models.tokenizer import load_tokenizer
from halo.preset import PRESETS
from halo.run import sha256

CONTEXT = multiprocessing.get_context("fork")
PARTS = {"align": Part(seq_len=64, tokens=100_000), "finetune": Part(seq_len=1024, tokens=200_000)}
DOCUMENTS = 2000
PIECE = 16_000
"""Bytes, so that there are some hundred pieces, of which most are needed."""


def soak(scratch: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    source, tokenizer = scratch / "source.jsonl", load_tokenizer(PRESETS / "tiny" / "teacher")
    _write_source(source)
    began = time.monotonic()
    _end(_start(source, tokenizer, scratch / "whole", workers=2, tasks=1))
    seconds = time.monotonic() - began
    expected = _digests(scratch / "whole")

    killed, done, amid_end = scratch / "killed", 0, 0
    while done < kills:
        workers, tasks, at_the_end = rng.randint(1, 3), rng.randint(1, 3), rng.random() < 0.25
        processes = _start(source, tokenizer, killed, workers, tasks)
        moment = rng.uniform(0, seconds / 4)
        if _await(killed, processes, moment, at_the_end):
            victims = _victims(processes, rng)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            done += 1
            amid_end += at_the_end
            when = "amid the end" if at_the_end else f"after {moment:.2f} s"
            print(f"killed {len(victims)} of the processes of {tasks} tasks on {workers} workers, {when}", flush=True)
            for process in processes:
                process.join()
        else:
            _end(processes)
            assert _digests(killed) == expected, "other files"
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    _end(_start(source, tokenizer, killed, workers=2, tasks=2))
    assert _digests(killed) == expected, "other files"
    print(f"{amid_end} of {kills} kills met the end being put together", flush=True)
    print(f"{len(expected)} files are bit for bit those of a preparation without kills", flush=True)


def _write_source(path: Path) -> None:
    words = np.array((PRESETS / "tiny" / "corpus" / "emma.txt").read_text().split())
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(DOCUMENTS):
            file.write(json.dumps({"text": " ".join(words[rng.integers(0, len(words), rng.integers(20, 300))])}) + "\n")


def _start(
    source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, workers: int, tasks: int
) -> list[BaseProcess]:
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=_prepare, args=(source, tokenizer, folder, workers, task, tasks))
        for task in range(tasks)
    ]
    for process in processes:
        process.start()
    return processes


def _prepare(
    source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, workers: int, task: int, tasks: int
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # bars
    shares = {"workers": workers, "task": task, "tasks": tasks}
    try:
        prepare(source, tokenizer, folder, PARTS, piece_bytes=PIECE, held_out=0.02, **shares)  # type: ignore[arg-type]
    except UserError as error:
        print(f"task {task} ended: {error}", flush=True)
        os._exit(2)


def _await(folder: Path, processes: list[BaseProcess], moment: float, at_the_end: bool) -> bool:
    """Wait for the moment of a kill. False: it is over already."""
    while at_the_end and not (folder / "finetune" / "joined.partial").exists():
        if not any(process.is_alive() for process in processes):
            return False
        time.sleep(0.001)
    time.sleep(moment / 50 if at_the_end else moment)
    return all(process.is_alive() for process in processes) or (at_the_end and any(p.is_alive() for p in processes))


def _victims(processes: list[BaseProcess], rng: random.Random) -> list[int]:
    """All tasks, or one, or one worker of one."""
    alive = [process.pid for process in processes if process.is_alive() and process.pid]
    one = rng.choice(alive)
    children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
    choices = [alive, [one], *([[int(rng.choice(children))]] if children else [])]
    return rng.choice(choices)


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join()
        assert process.exitcode == 0, "it could not resume"


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1000), help="of the moments; printed")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), **vars(arguments))
