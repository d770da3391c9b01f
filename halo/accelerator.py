"""What this process computes on: a GPU, or the CPU where there is none, or where `DS_ACCELERATOR=cpu` asks for it.

torch finds no GPU under a driver that is older than it needs, and in a build for CPUs. A job that has GPUs must not
train on CPUs then, without a word.
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch

from halo.errors import UserError

DRIVERS = {"13": 580, "12": 525}
"""CUDA's major version -> the oldest driver under which torch's builds for it find a GPU."""
ASK = "DS_ACCELERATOR"
"""DeepSpeed's variable that names the accelerator."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
SLURMS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")
"""Variables of which Slurm sets some in a job that has GPUs."""


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return not _cpu_is_asked_for() and torch.cuda.is_available()


def check_gpu() -> None:
    """Refuse to run on the CPU where there are GPUs that torch cannot use. Call it before the ranks' variables are set.

    Raises:
        UserError: which GPUs there are, why torch finds none as far as that is known, and what to do.
    """
    if _cpu_is_asked_for() or torch.cuda.is_available():
        return
    if found := _signs_of_gpus():
        raise UserError(f"{found}, but torch {torch.__version__} finds no GPU: {_cure()}; or set {ASK}=cpu to use CPUs")


def _cpu_is_asked_for() -> bool:
    return os.environ.get(ASK) == "cpu"


def _signs_of_gpus() -> str | None:
    """What says that there are GPUs; None: nothing does."""
    for name in SLURMS:
        # The first two are GPUs' numbers, the others are how many there are.
        value = os.environ.get(name, "")
        if value and (value != "0" or name.endswith(("STEP_GPUS", "JOB_GPUS"))):
            return f"Slurm gave this job GPUs ({name}={value})"
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES on machines without GPUs, too, and LOCAL_SIZE with it.
    visible = os.environ.get(VISIBLE, "")
    if "LOCAL_SIZE" not in os.environ and _names_gpus(visible):
        return f"this job is given GPUs ({VISIBLE}={visible})"
    if listed := _nvidia_smi("--list-gpus"):
        return f"nvidia-smi lists {len(listed)} GPU{'s' * (len(listed) > 1)}"
    if devices := [path for path in sorted(Path("/dev").glob("nvidia[0-9]*")) if os.access(path, os.R_OK | os.W_OK)]:
        return f"there is {devices[0]}"
    return None


def _names_gpus(visible: str) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES names GPUs: Slurm writes "NoDevFiles" for none."""
    return visible not in ("", "-1", "NoDevFiles")


def _cure() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return "this build of torch has no CUDA; install one that has"
    if not _names_gpus(os.environ.get(VISIBLE, "0")):
        return f"{VISIBLE}='{os.environ[VISIBLE]}' hides them; unset it"
    needed = DRIVERS.get(cuda.partition(".")[0])
    needs = f"this build is for CUDA {cuda}" + (f" and needs driver {needed} or newer" if needed else "")
    if not (drivers := _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")):
        return f"{needs}; check that nvidia-smi works here"
    driver = drivers[0]
    if needed is None or int(driver.partition(".")[0]) >= needed:
        return f"{needs}, and there is {driver}; check the GPUs and the container"
    return f"{needs}, and there is {driver}; update the driver, or install a build for an older CUDA (docs/cluster.md)"


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
