"""The fused losses against plain fp32 and float64 references over every token."""

import pytest
import torch
import torch.nn.functional as F

from halo.losses import IGNORE, alignment_mse, linear_cross_entropy, linear_kl

N, V, D, E = 700, 97, 16, 24
"""More tokens than one public code's 512 rows, and no multiple of any chunk."""


@pytest.fixture
def factors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {"hidden": draw(N, D), "head": draw(V, D), "teacher_hidden": draw(N, E), "teacher_head": draw(V, E)}


def plain_kl(hidden, head, teacher_hidden, teacher_head):
    student = F.log_softmax(hidden @ head.T, dim=-1)
    teacher = F.log_softmax(teacher_hidden @ teacher_head.T, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()


@pytest.mark.parametrize("chunk", [64, 100, 4096])
def test_kl_and_its_gradients_equal_the_plain_reference(factors, chunk):
    expected = {k: v.double().requires_grad_() for k, v in factors.items()}
    reference = plain_kl(**expected)
    reference.backward()
    factors["hidden"].requires_grad_()
    factors["head"].requires_grad_()
    loss, _ = linear_kl(**factors, chunk=chunk)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=0)
    for name in ("hidden", "head"):
        torch.testing.assert_close(factors[name].grad.double(), expected[name].grad, rtol=1e-5, atol=1e-7)
    assert factors["teacher_hidden"].grad is None
    assert factors["teacher_head"].grad is None


def test_every_token_counts_once(factors):
    """The mean over 700 tokens is that of its parts, also beyond the first 512 rows."""
    whole, _ = linear_kl(**factors)
    parts = []
    for rows in (slice(0, 512), slice(512, N)):
        part = factors | {k: factors[k][rows] for k in ("hidden", "teacher_hidden")}
        parts.append(linear_kl(**part)[0] * len(part["hidden"]))
    torch.testing.assert_close(whole, sum(parts) / N)


def test_a_student_that_is_the_teacher_has_no_loss(factors):
    loss, metrics = linear_kl(
        factors["teacher_hidden"], factors["teacher_head"], factors["teacher_hidden"], factors["teacher_head"]
    )
    assert abs(loss.item()) < 1e-6
    assert metrics["agreement"] == 1.0


def test_metrics_are_those_of_the_logits(factors):
    _, metrics = linear_kl(**factors, chunk=64)
    student = factors["hidden"] @ factors["head"].T
    teacher = factors["teacher_hidden"] @ factors["teacher_head"].T
    torch.testing.assert_close(metrics["agreement"], (student.argmax(-1) == teacher.argmax(-1)).float().mean())
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(metrics["teacher_entropy"], entropy)


def test_cross_entropy_and_its_gradients_equal_the_plain_reference(factors):
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    labels[::7] = IGNORE
    hidden, head = (factors[k].double().requires_grad_() for k in ("hidden", "head"))
    reference = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE)
    reference.backward()
    factors["hidden"].requires_grad_()
    factors["head"].requires_grad_()
    loss = linear_cross_entropy(factors["hidden"], factors["head"], labels, chunk=64)
    loss.backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(factors["hidden"].grad.double(), hidden.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(factors["head"].grad.double(), head.grad, rtol=1e-5, atol=1e-7)


def test_alignment_is_the_mean_squared_error_in_fp32():
    output, target = torch.randn(2, 5, 8).bfloat16(), 3 * torch.randn(2, 5, 8).bfloat16()
    torch.testing.assert_close(alignment_mse(output, target), F.mse_loss(output.float(), target.float()))
