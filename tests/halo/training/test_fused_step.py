"""AdamW's kernel in Triton's interpreter, against torch's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halo.training.fused_step import FusedAdamW, PartitionState


def compare(sizes=(5001, 1, 1024, 70_000), starts=(0, 3)):
    """Three steps of pieces of these sizes, aligned and not, beside torch's."""
    for start in starts:
        torch.manual_seed(0)
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        expected = [torch.randn(size).requires_grad_() for size in sizes]
        optimizer = torch.optim.AdamW(expected, **settings)

        def beginning_at_start(x):
            return torch.cat([x.new_zeros(start), x])[start:]  # noqa: B023

        states = []
        for i, p in enumerate(expected):  # one group each
            moments = (beginning_at_start(torch.zeros(sizes[i])) for _ in range(2))
            weights = (beginning_at_start(x) for x in (p.detach(), p.detach().bfloat16()))
            states.append(PartitionState(*weights, *moments, factor=i % 2))
        step, adamw = torch.zeros(()), FusedAdamW()
        for factors in (None, torch.tensor([4.0, 1.0])):
            gradients = []
            for i, p in enumerate(expected):
                gradient = beginning_at_start(torch.randn(sizes[i]).bfloat16())
                p.grad = gradient.float() / (1 if factors is None else factors[i % 2])
                half = sizes[i] // 2
                gradients.append([gradient[:half], gradient[half:]])
            optimizer.step()
            step += 1
            adamw.prepare(states, gradients)
            adamw.run(step, factors, settings)
        for p, state in zip(expected, states, strict=True):
            torch.testing.assert_close(state.first, optimizer.state[p]["exp_avg"])
            torch.testing.assert_close(state.second, optimizer.state[p]["exp_avg_sq"])
            torch.testing.assert_close(state.master, p.detach(), rtol=1e-5, atol=1e-6)
            weight = state.weight.float()  # the interpreter rounds to zero
            torch.testing.assert_close(weight, state.master, rtol=2**-7, atol=0)


def test_the_kernel_is_adamw():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = "from tests.halo.training.test_fused_step import compare; compare(); compare((1024, 70_016), (0,))"
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=Path(__file__).parents[3])
