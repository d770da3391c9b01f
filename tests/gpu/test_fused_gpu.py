"""The kernels between matrix products, compiled, against float64 from the same bf16 operands."""

import pytest
import torch

from halo.losses.squared_error import squared_error
from hypenet import fused
from tests.hypenet.test_fused import outcome, projections

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOLERANCE = 0.006
"""Of the norm: a result is rounded to bf16 once, as is each gradient."""


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(function, inputs):
    assert all(fused.fused_kernel_serves(x) for x in inputs if x is not None)
    found = outcome(function, inputs)
    expected = outcome(function, [None if x is None else x.double() for x in inputs])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.double() - b).norm() / b.norm()).item() < TOLERANCE


@pytest.mark.parametrize("heads", [3, 16, 32])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (True, False), (False, True)])
def test_turn(heads, width, normed, turned):
    torch.manual_seed(0)
    angles = draw(2, 700, width)
    rope = (angles.cos(), angles.sin()) if turned else None

    def turn(x, weight):
        wide = None if rope is None else tuple(part.to(x.dtype) for part in rope)
        return fused.turn(x, weight, 1e-6, wide)

    check(turn, (draw(2, 700, heads, width), draw(width) if normed else None))


@pytest.mark.parametrize("width", [48, 2048, 4096])
@pytest.mark.parametrize("normed", [True, False])
def test_gated(width, normed):
    torch.manual_seed(0)
    weight = draw(width) if normed else None
    check(lambda x, w, z: fused.gated(x, w, 1e-6, z), (draw(3, 700, width), weight, draw(3, 700, width)))


@pytest.mark.parametrize("width", [48, 576, 2048, 4096])
@pytest.mark.parametrize("added", [True, False])
def test_normed(width, added):
    torch.manual_seed(0)
    delta = draw(3, 700, width) if added else None
    check(lambda x, d, w: fused.normed(x, d, w, 1e-6), (draw(3, 700, width), delta, draw(width)))


def test_projections():
    torch.manual_seed(0)
    weights = [draw(width, 640) / 25 for width in (640, 320, 64)]
    check(projections, (draw(3, 700, 640), *weights))


def test_swiglu():
    torch.manual_seed(0)
    check(fused.swiglu, (draw(3, 700, 1001), draw(3, 700, 1001)))


def test_squared_error():
    torch.manual_seed(0)
    output, target = draw(5, 1001, 640).requires_grad_(), draw(5, 1001, 640)
    wide = output.detach().double().requires_grad_()
    expected = (wide - target.double()).square().mean()
    expected.backward()
    error, square = squared_error(output, target)
    error.backward()
    torch.testing.assert_close(error.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(square.double(), target.double().square().mean(), rtol=1e-5, atol=0)
    assert ((output.grad.double() - wide.grad).norm() / wide.grad.norm()).item() < TOLERANCE
