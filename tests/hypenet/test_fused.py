"""The kernels between matrix products, in Triton's interpreter, against the plain torch beside them.

tests/gpu/test_fused_gpu.py runs them compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypenet import fused


def cases():
    """(function, inputs, which of them have gradients) of every form."""
    torch.manual_seed(0)
    batch, tokens, heads, width = 2, 5, 3, 8
    x, weight = torch.randn(batch, tokens, heads, width), torch.randn(width)
    angles = torch.randn(batch, tokens, width)
    rope = (angles.cos(), angles.sin())
    shared = tuple(part[:1] for part in rope)
    for given in (weight, None):
        for turned in (rope, shared, None):
            if given is not None or turned is not None:
                yield lambda x, w, turned=turned: fused.turn(x, w, 1e-6, turned), (x, given)
    rows, gate, wide = torch.randn(7, 24), torch.randn(7, 24), torch.randn(24)
    for given in (wide, None):
        yield lambda x, w, z: fused.gated(x, w, 1e-6, z), (rows, given, gate)
    yield fused.swiglu, (torch.randn(5, 700), torch.randn(5, 700))


def outcome(function, inputs):
    """The output, and the gradients of a weighted sum of it."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), [x for x in leaves if x is not None])
    return output.detach(), *gradients


def compare(served):
    """Every case by kernel (where `served`) and by torch."""
    for function, inputs in cases():
        expected = outcome(function, inputs)
        fused.fused_kernel_serves = lambda x: served
        found = outcome(function, inputs)
        fused.fused_kernel_serves = lambda x: False
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    fused.fused_kernel_serves, fused.LARGE = lambda x: served, 1
    for factor in (1.0, 0.25, float("nan")):
        x = torch.randn(5, 700)
        torch.testing.assert_close(fused.scale_(x.clone(), torch.tensor(factor)), x * factor, equal_nan=True)


def test_the_kernels_compute_what_plain_torch_does():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = "from tests.hypenet.test_fused import compare; compare(True)"
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=Path(__file__).parents[2])


def test_kernels_serve_half_precision_on_a_gpu_alone():
    assert not fused.fused_kernel_serves(torch.zeros(1)) and not fused.fused_kernel_serves(
        torch.zeros(1, dtype=torch.bfloat16)
    )
