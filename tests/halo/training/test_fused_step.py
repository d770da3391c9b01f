"""AdamW's kernel in Triton's interpreter, against torch's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halo.training.fused_step import fused_adamw


def compare():
    torch.manual_seed(0)
    size, settings = 5001, {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected = torch.randn(size).requires_grad_()
    optimizer = torch.optim.AdamW([expected], **settings)
    master, weight = expected.detach().clone(), expected.detach().bfloat16()
    first, second, step = torch.zeros(size), torch.zeros(size), torch.zeros(())
    for factor in (None, torch.tensor(4.0), torch.tensor(1.0)):
        gradient = torch.randn(size).bfloat16()
        expected.grad = gradient.float() / (1 if factor is None else factor)
        optimizer.step()
        step += 1
        fused_adamw(gradient, master, first, second, weight, step, factor, settings)
        state = optimizer.state[expected]
        torch.testing.assert_close(first, state["exp_avg"])
        torch.testing.assert_close(second, state["exp_avg_sq"])
        torch.testing.assert_close(master, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.float(), master, rtol=2**-7, atol=0)  # the interpreter rounds to zero


def test_the_kernel_is_adamw():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = "from tests.halo.training.test_fused_step import compare; compare()"
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=Path(__file__).parents[3])
