"""Stage 2 with a teacher on ranks of its own, as real commands: how all ranks end, whatever ends one of them."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from halo.errors import EXIT_USER_ERROR
from halo.launch import EXIT_SAVED
from tests.distributed.test_stopping import SECONDS_TO_END, start
from tests.launcher.conftest import SMALL, deepspeed, free_port

DEDICATED = ["--distill.teacher_placement", "dedicated", "--distill.teacher_ranks", "1"]
TYPED = ["--preset", "tiny", "--ds_config", "ds_configs/zero3.json", *SMALL, *DEDICATED]
ENDLESS = ["--distill.steps", "1000000", "--distill.save_every", "1000000"]


@pytest.fixture
def selected(demo, tmp_path: Path) -> Path:
    """A run whose next stage is stage 2."""
    run = shutil.copytree(demo[0], tmp_path / "run")
    for stage in ("distill", "finetune", "scaling", "export", "niah"):
        shutil.rmtree(run / stage)
    return run


def test_deepspeed_starts_both_kinds_of_ranks_and_a_second_start_finds_it_done(selected, demo, launch):
    done = deepspeed("launcher/kd.py", "--run", str(selected), *TYPED, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    weights, whole = (load_file(run / "distill" / "hybrid" / "model.safetensors") for run in (selected, demo[0]))
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    again = launch("launcher/kd.py", "--run", str(selected), *TYPED, ranks=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count(f"distill: done already, in {selected / 'distill'}") == 1


def start_ranks(run: Path, *more: str) -> list[subprocess.Popen[str]]:
    """A student and a teacher without a launcher, as srun starts them."""
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = (sys.executable, "launcher/kd.py", "--run", run, *TYPED, *more)
    return [start(*command, RANK=rank, LOCAL_RANK=rank, **world) for rank in range(2)]


def wait_for_steps(run: Path, number: int, ranks: list[subprocess.Popen[str]]) -> None:
    metrics = run / "distill" / "metrics.jsonl"
    first = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    while True:
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[0] for rank in ranks]
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= first + number:
            return
        psutil.wait_procs([psutil.Process(rank.pid) for rank in ranks], timeout=0.1)


def test_a_users_mistake_ends_both_with_one_line(selected, launch):
    mistake = ("--distill.teacher_logits", "top_k", "--distill.teacher_top_k", "5000")
    done = launch("launcher/kd.py", "--run", str(selected), *TYPED, *mistake, ranks=2)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.count("error: ") == 1
    assert "error: distill.teacher_top_k = 5000 is more than the 1024 words of the vocabulary" in done.stderr


def test_both_save_when_asked_to_stop(selected, started):
    """All get the signal, as from Slurm: the students save, and the teacher waits for them."""
    ranks = start_ranks(selected, *ENDLESS)
    started += ranks
    wait_for_steps(selected, 2, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    told = [rank.communicate(timeout=SECONDS_TO_END)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_SAVED] * 2, told
    assert "stopped after" in told[0]


@pytest.mark.parametrize(("victim", "other"), [(1, 0), (0, 1)], ids=["teacher", "student"])
def test_one_that_is_killed_ends_the_other(selected, started, victim, other):
    ranks = start_ranks(selected, *ENDLESS)
    started += ranks
    wait_for_steps(selected, 2, ranks)
    ranks[victim].kill()
    told = ranks[other].communicate(timeout=SECONDS_TO_END)[0]
    assert ranks[other].returncode not in (0, EXIT_SAVED, EXIT_USER_ERROR), told
    if other == 0:  # the store goes with the first student, and the teacher may notice that first
        assert "the teacher at the other end of a link is gone" in told
