"""Forward and backward as one CUDA graph: the losses, gradients and weights are those of the kernels one by one."""

import json
from dataclasses import replace

import pytest
import torch

from halo.teacher.batch import Batch
from halo.training.objectives import NextToken
from halo.training.recording import Minimised, _StepGraph
from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.mixers import MIXERS
from tests.distributed import jobs
from tests.distributed.conftest import shards  # noqa: F401
from tests.gpu.test_fused_step_gpu import one_rank  # noqa: F401
from tests.hypenet.sizes import SIZES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NOT_RECORDED: set[str] = set()
"""Mixers whose forward or backward waits for the GPU."""


@pytest.fixture
def recorded(monkeypatch):
    """Grows by one with each graph that is recorded."""
    calls = []
    plain = _StepGraph.__init__
    monkeypatch.setattr(_StepGraph, "__init__", lambda *args: (calls.append(1), plain(*args))[1])
    return calls


@pytest.mark.parametrize("zero", ["zero1.json", "zero2.json"])
@pytest.mark.parametrize("stage", ["distill", "align", "finetune"])
@pytest.mark.parametrize("micro_batch", [4, 8])
def test_losses_are_those_without_a_graph(one_rank, tmp_path, shards, recorded, monkeypatch, zero, stage, micro_batch):  # noqa: F811
    """The batch is 8: with two micro-batches, their gradients are summed."""
    settings, job = jobs.training(micro_batch=micro_batch, steps=12, clip=0.5), getattr(jobs, stage)
    graph = job(shards, tmp_path / "graph", zero, settings)
    assert recorded == [1]
    monkeypatch.setattr("halo.training.engine.worth_recording", lambda *_, **__: False)
    plain = job(shards, tmp_path / "plain", zero, settings)
    assert recorded == [1]
    assert jobs.losses(tmp_path / "graph") == pytest.approx(jobs.losses(tmp_path / "plain"), rel=1e-3)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(graph.weights[name], weight, rtol=2**-6, atol=2e-3, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_every_mixer(mixer, recorded):
    """A graph is recorded at the third batch, and serves another one at the fourth and, again, after a longer one."""
    torch.manual_seed(0)
    keys = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    keys |= {"num_hidden_layers": 2, "mixer_types": ["attn", mixer]}
    model = HypeNetForCausalLM(HypeNetConfig(**SIZES | keys)).cuda().bfloat16().train()
    objective = NextToken(model)
    parameters = list(model.parameters())
    run = Minimised(objective, 1, recordable=True)
    for tokens in (128, 128, 128, 128, 192, 128):
        batch = Batch.on_host(torch.randint(1, 61, (2, tokens))).to(torch.device("cuda"))
        try:
            expected = torch.autograd.grad(objective(batch)[0], parameters)
        except RuntimeError as error:
            if "computes wrong gradients" in str(error):
                pytest.skip(str(error))
            raise
        minimised, loss, _ = run(batch)
        minimised.backward()
        torch.testing.assert_close(loss, minimised.detach())
        for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
            error = (p.grad - gradient).float().norm() / gradient.float().norm().clamp(min=1e-12)
            assert error < 0.01, (name, tokens, error)
            p.grad = None
    assert len(recorded) == (0 if mixer in NOT_RECORDED else 3)


def test_a_probe_between_recorded_steps(one_rank, tmp_path, shards, recorded):  # noqa: F811
    """The step after it is the same graph, and figures and losses are those without one."""
    settings = jobs.training(micro_batch=8, steps=8)
    probed = replace(settings, probe_every=1)
    found = [jobs.distill(shards, tmp_path / name, "zero1.json", s) for name, s in (("a", settings), ("b", probed))]
    assert recorded == [1, 1]
    assert jobs.losses(tmp_path / "a") == pytest.approx(jobs.losses(tmp_path / "b"), rel=1e-3)
    for name, weight in found[0].weights.items():
        torch.testing.assert_close(weight, found[1].weights[name], rtol=2**-6, atol=2e-3, msg=name)
    kl = [json.loads(line)["probe/kl"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert kl[-1] < kl[0]
