"""AdamW's kernel in Triton's interpreter, against torch's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halo.training.fused_step import GradientPiece, prepared_adamw


def compare(sizes=(5001, 1, 1024, 70_000), starts=(0, 3)):
    """Three steps of pieces of these sizes, aligned and not, beside torch's."""
    for start in starts:
        torch.manual_seed(0)
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        expected = [torch.randn(size).requires_grad_() for size in sizes]
        optimizer = torch.optim.AdamW(expected, **settings)

        def beginning_at_start(x):
            return torch.cat([x.new_zeros(start), x])[start:]  # noqa: B023

        state = [[beginning_at_start(x) for x in (p.detach(), p.detach().bfloat16())] for p in expected]
        moments = [[beginning_at_start(torch.zeros(size)) for _ in range(2)] for size in sizes]
        step = torch.zeros(())
        for factors in (None, torch.tensor([4.0, 1.0])):
            pieces = []
            for i, p in enumerate(expected):
                gradient = beginning_at_start(torch.randn(sizes[i]).bfloat16())
                p.grad = gradient.float() / (1 if factors is None else factors[i % 2])
                pieces.append(GradientPiece(gradient, *state[i], *moments[i], factor=i % 2))
            optimizer.step()
            step += 1
            prepared_adamw(pieces, step, factors, settings)()
        for p, (master, weight), (first, second) in zip(expected, state, moments, strict=True):
            torch.testing.assert_close(first, optimizer.state[p]["exp_avg"])
            torch.testing.assert_close(second, optimizer.state[p]["exp_avg_sq"])
            torch.testing.assert_close(master, p.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(weight.float(), master, rtol=2**-7, atol=0)  # the interpreter rounds to zero


def test_the_kernel_is_adamw():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = "from tests.halo.training.test_fused_step import compare; compare(); compare((1024, 70_000), (0,))"
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=Path(__file__).parents[3])
