"""AdamW's kernel, compiled, against torch's own in float64; and on DeepSpeed's ZeRO-1 and 2."""

import pytest
import torch

from halo.training.fused_step import FusedAdamW, FusedStep, PartitionState
from tests.distributed import jobs
from tests.distributed.conftest import shards  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def one_rank(monkeypatch):
    """The world of one rank that DeepSpeed makes."""
    for name, value in (ALONE | {"MASTER_PORT": "29571"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("start", "sizes"), [(0, (3_000_001, 1, 32_768)), (3, (3_000_001, 1, 32_768)), (0, (3_000_000, 16, 32_768))]
)
def test_the_kernel_is_adamw(start, sizes):
    """Pieces of several sizes, which begin at multiples of 16 bytes and elsewhere."""
    torch.manual_seed(0)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected = [torch.randn(size, device="cuda", dtype=torch.float64).requires_grad_() for size in sizes]
    optimizer = torch.optim.AdamW(expected, **settings)

    def beginning_at_start(x):
        return torch.cat([x.new_zeros(start), x])[start:]

    states = []
    for i, p in enumerate(expected):  # one group each
        moments = (beginning_at_start(torch.zeros(sizes[i], device="cuda")) for _ in range(2))
        weights = (beginning_at_start(x) for x in (p.detach().float(), p.detach().bfloat16()))
        states.append(PartitionState(*weights, *moments, factor=i % 2))
    step, adamw = torch.zeros((), device="cuda"), FusedAdamW()
    for factors in (None, torch.tensor([4.0, 1.0], device="cuda"), None):
        gradients = []
        for i, p in enumerate(expected):
            gradient = beginning_at_start(torch.randn(sizes[i], device="cuda").bfloat16())
            p.grad = gradient.double() / (1 if factors is None else factors[i % 2])
            gradients.append([gradient])
        optimizer.step()
        step += 1
        adamw.prepare(states, gradients)
        adamw.run(step, factors, settings)
        torch.cuda.synchronize()
        for p, state in zip(expected, states, strict=True):
            torch.testing.assert_close(state.master.double(), p.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(state.weight, state.master.bfloat16())


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
