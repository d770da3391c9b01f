"""The fused KL's kernel on a GPU, against float64 from the same bf16 operands."""

import pytest
import torch

from halo.teacher.logits import LogitsForm
from tests.halo.losses.test_linear_kl import fused, naive_top_k, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

N, V, D, E = 1300, 30_001, 64, 96
"""No multiples of a block; a last chunk that is not full."""


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [128, None])  # 11 chunks, or one
@pytest.mark.parametrize("options", [{}, {"labels": True, "cross_entropy": 0.5, "temperature": 2.0}], ids=["kl", "all"])
def test_loss_and_gradients(options, chunk, dtype):
    torch.manual_seed(0)
    shapes = {"hidden": (N, D), "head": (V, D), "teacher_hidden": (N, E), "teacher_head": (V, E)}
    factors = {name: (torch.randn(*shape, device="cuda") / 3).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(0, V, (N,), device="cuda")
    labels[::7] = -100
    options = {name: labels if name == "labels" else value for name, value in options.items()}

    exact = {k: v.double().requires_grad_() for k, v in factors.items()}
    expected, *_ = plain(**exact, **options)
    expected.backward()
    factors["hidden"].requires_grad_(), factors["head"].requires_grad_()
    loss, _ = fused(factors, **options, chunk=chunk)
    loss.backward()
    assert relative_error(loss, expected) < 1e-5
    # The gradients pass through bf16 once as logits' and once as their own; the head's also as sums of chunks.
    tolerance = 0.006 if dtype == torch.bfloat16 else 1e-5
    for name in ("hidden", "head"):
        assert relative_error(factors[name].grad, exact[name].grad) < tolerance


@pytest.mark.parametrize("kind", ["full", "top_k"])
def test_other_forms_of_the_teachers_logits(kind):
    torch.manual_seed(0)
    shapes = {"hidden": (N, D), "head": (V, D), "teacher_hidden": (N, E), "teacher_head": (V, E)}
    factors = {name: torch.randn(*shape, device="cuda") / 3 for name, shape in shapes.items()}
    exact = {k: v.double().requires_grad_() for k, v in factors.items()}
    expected, *_ = naive_top_k(**exact, k=16) if kind == "top_k" else plain(**exact)
    expected.backward()
    factors["hidden"].requires_grad_(), factors["head"].requires_grad_()
    loss, _ = fused(factors, LogitsForm(kind=kind, words=V, top_k=16))
    loss.backward()
    assert relative_error(loss, expected) < 1e-5
    for name in ("hidden", "head"):
        assert relative_error(factors[name].grad, exact[name].grad) < 1e-5
