"""AdamW's kernel, compiled, against torch's own in float64; and on DeepSpeed's ZeRO-1 and 2."""

import pytest
import torch

from halo.training.fused_step import FusedStep, fused_adamw
from tests.distributed import jobs
from tests.distributed.conftest import shards  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def one_rank(monkeypatch):
    """The world of one rank that DeepSpeed makes."""
    for name, value in (ALONE | {"MASTER_PORT": "29571"}).items():
        monkeypatch.setenv(name, value)


def test_the_kernel_is_adamw():
    torch.manual_seed(0)
    size, settings = 3_000_001, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected = torch.randn(size, device="cuda", dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.AdamW([expected], **settings)
    master, weight = expected.detach().float(), expected.detach().bfloat16()
    first, second, step = torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device="cuda")
    for factor in (None, torch.tensor(4.0, device="cuda"), torch.tensor(1.0, device="cuda"), None):
        gradient = torch.randn(size, device="cuda").bfloat16()
        expected.grad = gradient.double() / (1 if factor is None else factor)
        optimizer.step()
        step += 1
        fused_adamw(gradient, master, first, second, weight, step, factor, settings)
        torch.testing.assert_close(master.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("zero", ["zero1.json", "zero2.json"])
@pytest.mark.parametrize("stage", ["distill", "align"])
def test_losses_are_those_of_deepspeeds_own_step(one_rank, tmp_path, shards, monkeypatch, zero, stage):  # noqa: F811
    settings, job = jobs.training(micro_batch=4, steps=12, clip=0.5), getattr(jobs, stage)
    calls = []
    plain = FusedStep.step
    monkeypatch.setattr(FusedStep, "step", lambda step, closure=None: (calls.append(1), plain(step, closure)))
    fused = job(shards, tmp_path / "fused", zero, settings)
    assert len(calls) == 12
    monkeypatch.setattr("halo.training.engine.fused_step_serves", lambda zero: False)
    other = job(shards, tmp_path / "plain", zero, settings)
    assert len(calls) == 12
    assert jobs.losses(tmp_path / "fused") == pytest.approx(jobs.losses(tmp_path / "plain"), rel=1e-3)
    for name, weight in other.weights.items():
        torch.testing.assert_close(fused.weights[name], weight, rtol=2**-6, atol=2e-3, msg=name)
