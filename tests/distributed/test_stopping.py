"""Signals to real commands: what they end with, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from halo.launch import EXIT_SAVED
from tests.launcher.conftest import BIN, ENVIRONMENT, ROOT, SMALL, free_port

SECONDS_TO_END = 60.0
"""Of a rank beside one that was killed."""
ENDLESS = [*SMALL, "--align.steps", "1000000", "--align.save_every", "1000000"]


def start(*command: object, **environment: object) -> subprocess.Popen[str]:
    variables = {name: str(value) for name, value in environment.items()}
    path = f"{BIN}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_ranks(run: Path) -> list[subprocess.Popen[str]]:
    """Two ranks of stage 1 without a launcher, as srun starts them."""
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = (sys.executable, "launcher/align.py", "--run", run, "--ds_config", "ds_configs/zero3.json", *ENDLESS)
    return [start(*command, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)]


def start_deepspeed(ranks: int, *command: object) -> subprocess.Popen[str]:
    return start(BIN / "deepspeed", "--num_gpus", ranks, "--master_port", free_port(), *command)


def steps(run: Path) -> int:
    metrics = run / "align" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def wait_for_steps(run: Path, number: int, command: subprocess.Popen[str]) -> None:
    while steps(run) < number:
        assert command.poll() is None, command.communicate()[0]
        time.sleep(0.05)


def saved(run: Path) -> int:
    """The step that the run resumes from: the number of lines in metrics.jsonl."""
    latest = (run / "align" / "checkpoints" / "latest").read_text().strip()
    state = json.loads((run / "align" / "checkpoints" / latest / "state.json").read_text())
    assert state["progress"]["step"] == steps(run)
    return steps(run)


def test_ranks_that_are_asked_to_stop_or_killed(tmp_path, started):
    run = tmp_path / "run"
    ranks = start_ranks(run)
    started += ranks
    wait_for_steps(run, 2, ranks[0])
    for rank in ranks:  # as Ctrl-C does
        rank.send_signal(signal.SIGINT)
    told = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_SAVED] * 2, told
    done = saved(run)
    assert "Traceback" not in "".join(told)
    assert f"align: stopped after {done} of 1000000 steps, and saved: the same command resumes" in told[0]

    ranks = start_ranks(run)
    started += ranks
    wait_for_steps(run, done + 2, ranks[0])
    ranks[1].kill()
    ranks[0].communicate(timeout=SECONDS_TO_END)
    assert ranks[0].returncode not in (0, EXIT_SAVED)


def test_the_deepspeed_launcher_passes_the_status_on(tmp_path, started):
    run = tmp_path / "run"
    command = start_deepspeed(2, "launcher/align.py", "--run", run, *ENDLESS)
    started.append(command)
    wait_for_steps(run, 2, command)
    family = psutil.Process(command.pid).children(recursive=True)
    (rank,) = [process for process in family if "--local_rank=1" in process.cmdline()]
    rank.send_signal(signal.SIGUSR1)
    told = command.communicate()[0]
    assert command.returncode == EXIT_SAVED, told
    assert saved(run) >= 2


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path, started):
    """Killed alone, DeepSpeed's launcher leaves the process that started the ranks, which knows nothing of it."""
    run = tmp_path / "run"
    command = start_deepspeed(1, "launcher/align.py", "--run", run, *ENDLESS)
    started.append(command)
    wait_for_steps(run, 2, command)
    family = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_END)
    assert not alive
    assert saved(run) >= 2


def test_a_second_interrupt_ends_a_rank_at_once():
    code = (
        "import os, signal, time\n"
        "from halo.stop import stop_requests\n"
        "with stop_requests() as asked:\n"
        "    assert not asked()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # torchrun's, of the same key
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # DeepSpeed's
        "    assert asked()\n"
        "    time.sleep(1.1)\n"
        "    print('saving', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('saved')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "saving\n", "")
