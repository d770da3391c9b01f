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
    for delta in (torch.randn(7, 24), None):
        yield lambda x, d, w: fused.normed(x, d, w, 1e-6), (rows, delta, wide)
        yield lambda x, d, w: fused.normed(x, d, w, 1e-6)[0], (rows, delta, wide)
        yield lambda x, d, w: fused.normed(x, d, w, 1e-6)[1].sin(), (rows, delta, wide)
    yield lambda x, a, b: projections(x, a, None, b), (torch.randn(2, 5, 24), torch.randn(8, 24), torch.randn(6, 24))
    yield fused.swiglu, (torch.randn(5, 700), torch.randn(5, 700))


def projections(x, *weights):
    """`fused.projections` of linear layers with these weights."""
    layers = []
    for weight in weights:
        layer = None if weight is None else torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        if layer is not None:
            layer._parameters["weight"] = weight
        layers.append(layer)
    return tuple(output for output in fused.projections(x, *layers) if output is not None)


def outcome(function, inputs):
    """The outputs, and the gradients of a weighted sum of them."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    drawn = torch.Generator().manual_seed(1)
    total = sum((output * torch.randn(output.shape, generator=drawn).to(output)).sum() for output in outputs)
    given = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(total, given, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(given, gradients, strict=True)]
    return *(output.detach() for output in outputs), *zeros


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


def adapted(linear):
    return torch.nn.Sequential(linear)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


def patched(linear):
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], 6)
    return linear


@pytest.mark.parametrize(
    "change", [adapted, hooked, patched, lambda linear: linear.double().float(), lambda linear: linear.bfloat16()]
)
def test_a_layer_that_is_more_than_a_product_is_called(change, monkeypatch):
    """An adapter, a hook, a forward that offloading gave it, a bias, or another precision."""
    monkeypatch.setattr(fused, "fused_kernel_serves", lambda x: True)
    x = torch.randn(2, 5, 24, requires_grad=True)
    plain, layer = torch.nn.Linear(24, 8, bias=False), change(torch.nn.Linear(24, 6))
    if layer.__class__ is torch.nn.Linear and layer.weight.dtype != x.dtype:
        with pytest.raises(RuntimeError, match="dtype"):  # torch's own words: nothing is cast in silence
            fused.projections(x, plain, layer)
        return
    found = fused.projections(x, plain, layer)
    torch.testing.assert_close(found, (plain(x), layer(x)))


def test_kernels_serve_half_precision_on_a_gpu_alone():
    assert not fused.fused_kernel_serves(torch.zeros(1)) and not fused.fused_kernel_serves(
        torch.zeros(1, dtype=torch.bfloat16)
    )
