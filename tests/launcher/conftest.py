"""One small run of everything, on two ranks under ZeRO-3, that the tests of this folder look at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# fmt: off
SMALL = [
    "--align.steps", "2", "--align.batch", "4", "--align.warmup", "1", "--align.corpus.samples", "16",
    "--selection.needles", "2", "--selection.questions", "4",
    "--distill.steps", "2", "--distill.batch", "4", "--distill.warmup", "1", "--distill.corpus.samples", "16",
    "--finetune.steps", "2", "--finetune.batch", "2", "--finetune.seq_len", "256", "--finetune.corpus.samples", "16",
    "--scaling.candidates", "[128, 512]", "--scaling.seq_len", "512", "--scaling.documents", "2",
    "--eval.lengths", "[256, 512]", "--eval.samples", "[2, 2]",
]
# fmt: on


def deepspeed(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run DeepSpeed's launcher as a user types it, from the repository's root."""
    return _run(BIN / "deepspeed", "--num_gpus", str(ranks), *arguments)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher as a plain process."""
    return _run(sys.executable, *arguments)


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what the demo printed."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    done = deepspeed("launcher/demo.py", "--run", str(run), "--ds_config", "ds_configs/zero3.json", *SMALL, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout
