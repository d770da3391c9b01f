"""One small run of everything, on two ranks under ZeRO-3, that the tests of this folder look at."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from halo.preset import load_config
from tests.distributed.ranks import CONTEXT

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TEACHER = Path(load_config("tiny").teacher)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
"""Of commands that tests start. DeepSpeed's optimizers would import torch's compiler, which takes seconds a rank."""

# fmt: off
SMALL = [
    "--align.steps", "2", "--align.batch", "4", "--align.warmup", "1", "--align.corpus.samples", "16",
    "--selection.needles", "2", "--selection.questions", "4",
    "--distill.steps", "2", "--distill.batch", "4", "--distill.warmup", "1", "--distill.corpus.samples", "16",
    "--distill.probe_every", "1", "--distill.probe_samples", "2", "--distill.probe_lengths", "[256]",
    "--finetune.probe_every", "2", "--finetune.probe_samples", "2", "--finetune.probe_lengths", "[256]",
    "--finetune.steps", "2", "--finetune.batch", "2", "--finetune.seq_len", "256", "--finetune.corpus.samples", "16",
    "--scaling.candidates", "[128, 512]", "--scaling.lengths", "[256, 512]",
    "--scaling.needles", "1", "--scaling.documents", "2",
    "--niah.lengths", "[256, 512]", "--niah.samples", "[2, 2]",
]
ZERO3 = ["--ds_config", "ds_configs/zero3.json"]
# fmt: on


Launch = Callable[..., subprocess.CompletedProcess[str]]


def deepspeed(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run DeepSpeed's launcher as a user types it, from the repository's root."""
    return _run(BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), *arguments)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher as a plain process."""
    return _run(sys.executable, *arguments)


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A copy of the embedded teacher."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch("launcher/kd.py", ..., ranks=2)`: a launcher on ranks without DeepSpeed's, as torchrun starts them.

    They are forked from a server: importing torch and DeepSpeed takes longer than most of what is tested here.
    """

    def run(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        port, logs = free_port(), Path(tempfile.mkdtemp(dir=tmp_path))
        processes = [CONTEXT.Process(target=_rank, args=(rank, ranks, port, logs, arguments)) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(280)
        finally:
            for process in processes:
                process.kill()
        out, err = ("".join(log.read_text() for log in sorted(logs.glob(f"*.{name}"))) for name in ("out", "err"))
        statuses = {process.exitcode for process in processes}
        assert len(statuses) == 1, f"the ranks ended with {statuses}: {out}{err}"
        return subprocess.CompletedProcess(arguments, statuses.pop(), out, err)

    return run


def _rank(rank: int, world_size: int, port: int, logs: Path, arguments: tuple[str, ...]) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "HF_HUB_OFFLINE": "1"}
    os.chdir(ROOT)
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what the demo printed."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    done = deepspeed("launcher/convert.py", "--until", "niah", "--run", str(run), *ZERO3, *SMALL, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout
