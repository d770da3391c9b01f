"""A job that has GPUs is not run on CPUs without a word: where torch finds no GPU, the signs of one decide."""

import os
from pathlib import Path

import pytest
import torch

from halo import accelerator
from halo.accelerator import check_gpu, on_gpu
from halo.distributed import device
from halo.errors import UserError
from tests.launcher.conftest import python


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(gpus=8, driver="550.54.15", CUDA_VISIBLE_DEVICES="0")`: what torch, whose CUDA is 13.0, does not see."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "LOCAL_SIZE", *accelerator.SLURMS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.setattr(accelerator, "Path", lambda path: tmp_path)  # its /dev

    def be(*, gpus: int | None = None, driver: str = "590.48.01", status: int = 0, **variables: str) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if gpus is not None:
            tool = tmp_path / "nvidia-smi"
            line = f"if [ $1 = --list-gpus ]; then echo GPU; else echo {driver}; fi\n"
            tool.write_text(f"#!/bin/sh\n{line * gpus}exit {status}\n")
            tool.chmod(0o755)

    return be


def refusal() -> str:
    with pytest.raises(UserError) as error:
        check_gpu()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_SIZE": "1"},  # DeepSpeed's launcher, on any machine
        {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0", "SLURM_GPUS": ""},
        {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "8"},
    ],
    ids=str,
)
def test_a_run_on_cpus_where_there_is_no_gpu_or_they_are_asked_for(machine, variables):
    machine(**variables)
    check_gpu()
    assert not on_gpu()


def test_nvidia_smi_that_finds_none(machine):
    machine(gpus=0)
    check_gpu()
    machine(gpus=1, status=9)
    check_gpu()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "Slurm gave this job GPUs (SLURM_GPUS_ON_NODE=8)"),
        ({"SLURM_JOB_GPUS": "0"}, "Slurm gave this job GPUs (SLURM_JOB_GPUS=0)"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "Slurm gave this job GPUs (SLURM_GPUS_PER_NODE=h100:8)"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "this job is given GPUs (CUDA_VISIBLE_DEVICES=0)"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "this job is given GPUs (CUDA_VISIBLE_DEVICES=GPU-8932f937)"),
    ],
    ids=str,
)
def test_variables_that_say_that_there_are_gpus(machine, variables, found):
    machine(**variables)
    assert refusal() == (
        f"{found}, but torch 2.14.1+cu130 finds no GPU: this build is for CUDA 13.0 and needs driver 580 or newer; "
        "check that nvidia-smi works here; or set DS_ACCELERATOR=cpu to use CPUs"
    )


def test_an_old_driver(machine):
    machine(gpus=8, driver="550.54.15")
    assert refusal() == (
        "nvidia-smi lists 8 GPUs, but torch 2.14.1+cu130 finds no GPU: this build is for CUDA 13.0 and needs driver "
        "580 or newer, and there is 550.54.15; update the driver, or install a build for an older CUDA "
        "(docs/cluster.md); or set DS_ACCELERATOR=cpu to use CPUs"
    )


def test_a_build_for_cpus_and_one_for_another_cuda(machine, monkeypatch):
    machine(gpus=1, driver="550.54.15")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "lists 1 GPU, " in refusal()
    assert "this build of torch has no CUDA; install one that has" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "for CUDA 12.8 and needs driver 525 or newer, and there is 550.54.15; check the GPUs and" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    assert "for CUDA 14.0, and there is 550.54.15; check the GPUs" in refusal()


def test_hidden_gpus(machine):
    machine(gpus=2, CUDA_VISIBLE_DEVICES="")
    assert "finds no GPU: CUDA_VISIBLE_DEVICES='' hides them; unset it; or set DS_ACCELERATOR=cpu" in refusal()


def test_a_device_without_nvidia_smi(machine, tmp_path):
    machine()
    (tmp_path / "nvidiactl").touch()
    check_gpu()
    (tmp_path / "nvidia0").touch()
    assert refusal().startswith(f"there is {tmp_path / 'nvidia0'}, but torch")


def test_cpus_are_used_beside_gpus_only_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check_gpu()
    assert on_gpu() and device().type == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_gpu()
    assert not on_gpu() and device().type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPUs torch does not find")
@pytest.mark.parametrize("script", ["kd.py", "convert.py"])
def test_a_launcher_refuses_before_anything_is_built(monkeypatch, tmp_path: Path, script: str):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    done = python(f"launcher/{script}", "--run", str(tmp_path / "run"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: Slurm gave this job GPUs (SLURM_GPUS_ON_NODE=8), but torch")
    assert "Traceback" not in done.stderr and not os.path.exists(tmp_path / "run")
