"""Stage 2's fused loss against a plain float64 reference over every token; the kernel against plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from halo.losses.linear_kl import linear_kl
from halo.teacher.logits import FactoredLogits, LogitsForm

N, V, D, E = 700, 97, 16, 24
"""More tokens than one public code's 512 rows, and no multiple of any chunk."""


@pytest.fixture
def factors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {"hidden": draw(N, D), "head": draw(V, D), "teacher_hidden": draw(N, E), "teacher_head": draw(V, E)}


@pytest.fixture
def labels() -> torch.Tensor:
    """Next tokens; every seventh has none."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    labels[6::7] = -100
    return labels


def fused(factors, form: LogitsForm | None = None, **options):
    """`linear_kl`, where the teacher supplies its logits in factored or another form."""
    hidden, head, teacher_hidden, teacher_head = factors.values()
    form = form or LogitsForm()
    return linear_kl(hidden, head, form.supply(teacher_hidden, teacher_head), **options)


def plain(hidden, head, teacher_hidden, teacher_head, labels=None, temperature=1.0, cross_entropy=0.0):
    """(loss, kl, cross entropy), each a mean over the tokens, or over those that have a label."""
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    nll = torch.zeros(()) if labels is None else F.cross_entropy(student, labels)
    return temperature**2 * kl + cross_entropy * nll, kl, nll


OPTIONS = [
    {},
    {"temperature": 2.0},
    {"labels": True},
    {"labels": True, "cross_entropy": 0.5},
    {"labels": True, "cross_entropy": 0.5, "temperature": 0.5},
]


def chosen(options, labels):
    return {name: labels if name == "labels" else value for name, value in options.items()}


@pytest.mark.parametrize("chunk", [64, 100, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_reference(factors, labels, options, chunk):
    options = chosen(options, labels)
    exact = {k: v.double().requires_grad_() for k, v in factors.items()}
    expected, kl, nll = plain(**exact, **options)
    expected.backward()
    factors["hidden"].requires_grad_(), factors["head"].requires_grad_()
    loss, metrics = fused(factors, chunk=chunk, **options)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["kl"].double(), kl, rtol=1e-5, atol=0)
    if "labels" in options:
        torch.testing.assert_close(metrics["cross_entropy"].double(), nll.double(), rtol=1e-5, atol=0)
    for name in ("hidden", "head"):
        torch.testing.assert_close(factors[name].grad.double(), 3 * exact[name].grad, rtol=1e-5, atol=1e-6)
    assert factors["teacher_hidden"].grad is None and factors["teacher_head"].grad is None


def test_every_token_counts_once(factors):
    """The mean over 700 tokens is that of its parts, also beyond the first 512 rows."""
    whole, _ = fused(factors)
    parts = []
    for rows in (slice(0, 512), slice(512, N)):
        part = factors | {k: factors[k][rows] for k in ("hidden", "teacher_hidden")}
        parts.append(fused(part)[0] * len(part["hidden"]))
    torch.testing.assert_close(whole, sum(parts) / N)


def test_a_student_that_is_the_teacher_has_no_loss(factors):
    hidden, head = factors["teacher_hidden"], factors["teacher_head"]
    loss, metrics = linear_kl(hidden, head, FactoredLogits(hidden, head))
    assert abs(loss.item()) < 1e-6
    torch.testing.assert_close(metrics["agreement"], torch.tensor(1.0))


def test_metrics_are_those_of_the_logits(factors):
    _, metrics = fused(factors, chunk=64)
    student, teacher = factors["hidden"] @ factors["head"].T, factors["teacher_hidden"] @ factors["teacher_head"].T
    torch.testing.assert_close(metrics["agreement"], (student.argmax(-1) == teacher.argmax(-1)).float().mean())
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(metrics["teacher_entropy"], entropy)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("padded", ["head", "teacher_head"])
def test_heads_padded_to_different_sizes_share_their_words(factors, padded):
    short, _ = fused(factors)
    longer = factors | {padded: torch.cat([factors[padded], torch.full_like(factors[padded][:5], 9.0)])}
    longer["head"].requires_grad_()
    loss, _ = fused(longer)
    loss.backward()
    torch.testing.assert_close(loss, short)
    assert longer["head"].grad.shape == longer["head"].shape
    assert not longer["head"].grad[V:].any()


def test_half_precision_has_float32_logits(factors):
    """bf16 operands, exact products: rounding the logits to bf16 as well would be off by far more."""
    half = {k: v.bfloat16() for k, v in factors.items()}
    expected, *_ = plain(**{k: v.double() for k, v in half.items()})
    half["head"].requires_grad_()
    loss, _ = fused(half)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32 and half["head"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("tokens", "tolerance"), [(64, 0.004), (700, 0.006), (6400, 0.004)])
def test_the_heads_gradient_in_half_precision_does_not_decay_with_more_chunks(tokens, tolerance):
    """1, 11 and 100 chunks: few are summed in bf16, many in float32."""
    g = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(tokens, 16, generator=g).bfloat16() for _ in range(2))
    head, taught_head = (torch.randn(V, 16, generator=g).bfloat16() for _ in range(2))
    exact = head.double().requires_grad_()
    plain(hidden.double(), exact, taught.double(), taught_head.double())[0].backward()
    head.requires_grad_()
    linear_kl(hidden, head, FactoredLogits(taught, taught_head), chunk=64)[0].backward()
    assert (head.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


def test_float64_stays_float64(factors):
    factors = {k: v.double().requires_grad_() for k, v in factors.items()}
    loss, _ = fused(factors)
    expected, *_ = plain(**factors)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_there_is_no_second_backward(factors):
    """The gradients are handed out, not copied."""
    factors["hidden"].requires_grad_()
    loss, _ = fused(factors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


def test_what_is_not_trained_gets_no_gradient(factors):
    factors["hidden"].requires_grad_()
    fused(factors)[0].backward()
    assert factors["hidden"].grad is not None and factors["head"].grad is None
    with torch.no_grad():
        assert fused(factors)[0] > 0


def test_wrong_settings_are_named(factors):
    with pytest.raises(ValueError, match="needs labels"):
        fused(factors, cross_entropy=0.1)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        fused(factors, temperature=0)
    largest = LogitsForm(kind="top_k", words=V, top_k=3, temperature=2.0)
    with pytest.raises(ValueError, match=r"97 words at temperature 2\.0, but the student has 97 words, .* is 1\.0"):
        fused(factors, largest)
    factors["head"] = factors["head"][:50]
    with pytest.raises(ValueError, match="but the student has 50 words"):
        fused(factors, largest, temperature=2.0)


def naive_top_k(hidden, head, teacher_hidden, teacher_head, k, labels=None, temperature=1.0, cross_entropy=0.0):
    """(loss, kl): of the k most probable words and one that stands for all others, from probabilities as they are."""
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    q, p = ((x / temperature).softmax(-1) for x in (student, teacher))
    p_top, words = p.topk(k)
    q_top = q.gather(-1, words)
    kl = (p_top * (p_top / q_top).log()).sum(-1)
    if k < p.shape[1]:
        p_rest, q_rest = ((x.sum(-1) - top.sum(-1)) for x, top in ((p, p_top), (q, q_top)))
        kl = kl + p_rest * (p_rest / q_rest).log()
    nll = F.cross_entropy(student, labels) if cross_entropy else torch.zeros(())
    return temperature**2 * kl.mean() + cross_entropy * nll, kl.mean()


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_k_largest_logits_and_one_word_for_all_others(factors, labels, options, k):
    options = chosen(options, labels)
    form = LogitsForm(kind="top_k", words=V, top_k=k, temperature=options.get("temperature", 1.0))
    exact = {name: v.double().requires_grad_() for name, v in factors.items()}
    expected, kl = naive_top_k(**exact, k=k, **options)
    expected.backward()
    factors["hidden"].requires_grad_(), factors["head"].requires_grad_()
    loss, metrics = fused(factors, form, chunk=100, **options)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["kl"].double(), kl, rtol=1e-5, atol=0)
    for name in ("hidden", "head"):
        torch.testing.assert_close(factors[name].grad.double(), 3 * exact[name].grad, rtol=1e-5, atol=1e-6)

    _, whole = fused(factors, **options)
    for name in metrics.keys() - {"kl"}:
        torch.testing.assert_close(metrics[name], whole[name], msg=name)
    if k == V:
        torch.testing.assert_close(metrics["kl"], whole["kl"])
    else:
        assert metrics["kl"] < whole["kl"]


@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_the_k_largest_logits_where_the_others_have_next_to_no_probability(factors, spread):
    """Of the teacher, of the student, of both: also less than float32 can hold."""
    for wide in ("head", "teacher_head"):
        factors[wide] = factors[wide] * spread
        exact = {name: v.double().requires_grad_() for name, v in factors.items()}
        logits = exact["teacher_hidden"] @ exact["teacher_head"].T
        log_p, log_q = logits.log_softmax(-1), (exact["hidden"] @ exact["head"].T).log_softmax(-1)
        words = logits.topk(3).indices
        kl = 0
        for part in (lambda x, words=words: x.gather(-1, words), lambda x, words=words: rest_of(x, words)):
            kl = kl + (part(log_p).exp() * (part(log_p) - part(log_q))).sum(-1)
        kl.mean().backward()
        given = {name: v.clone() for name, v in factors.items()}
        given["hidden"].requires_grad_(), given["head"].requires_grad_()
        loss, _ = fused(given, LogitsForm(kind="top_k", words=V, top_k=3))
        loss.backward()
        torch.testing.assert_close(loss.double(), kl.mean(), rtol=1e-5, atol=0)
        for name in ("hidden", "head"):
            off = (given[name].grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
            assert off < 1e-4, (name, off)  # float32 logits of this size are off by as much


def rest_of(log_p, words):
    return log_p.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_full_logits_give_what_factored_ones_do(factors, labels, options):
    options = chosen(options, labels)
    results = []
    for form in (LogitsForm(), LogitsForm(kind="full", words=V)):
        given = {name: v.clone() for name, v in factors.items()}
        given["hidden"].requires_grad_(), given["head"].requires_grad_()
        loss, metrics = fused(given, form, chunk=100, **options)
        loss.backward()
        results.append((loss, metrics, given["hidden"].grad, given["head"].grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["full", "top_k"])
@pytest.mark.parametrize("padded", ["head", "teacher_head"])
def test_only_words_that_both_have_take_part_in_every_form(factors, kind, padded):
    form = LogitsForm(kind=kind, words=V, top_k=8)
    short, _ = fused(factors, form)
    longer = factors | {padded: torch.cat([factors[padded], torch.full_like(factors[padded][:5], 9.0)])}
    torch.testing.assert_close(fused(longer, form)[0], short)


def test_the_parts_of_each_form_are_what_it_is_put_together_from(factors):
    """As they travel from rank to rank."""
    for form in (LogitsForm(), LogitsForm(kind="full", words=V), LogitsForm(kind="top_k", words=V, top_k=8)):
        supplied = form.supply(factors["teacher_hidden"], factors["teacher_head"])
        room = form.empty(N, like=factors["teacher_head"])
        for empty, part in zip(room, supplied.parts, strict=True):
            assert (empty.shape, empty.dtype) == (part.shape, part.dtype)
            empty.copy_(part)
        again = form.assemble(room, factors["teacher_head"])
        for one, two in zip(again.parts, supplied.parts, strict=True):
            assert torch.equal(one, two)
        hidden, head = factors["hidden"], factors["head"]
        assert torch.equal(linear_kl(hidden, head, again)[0], linear_kl(hidden, head, supplied)[0])


INTERPRETED = """
import torch
from halo.losses.linear_kl_kernel import kl_rows_triton
from halo.losses.linear_kl import Terms, kl_rows

torch.manual_seed(0)
student, teacher = 4 * torch.randn(5, 9001), 4 * torch.randn(5, 9001)
weights, labels = torch.rand(5), torch.randint(0, 9001, (5,))
labels[2] = -100
label_weights = weights * (labels >= 0)
for terms in (Terms(1.0, 0.0), Terms(1.0, 0.5), Terms(2.0, 0.3)):
    for given in ((labels, label_weights), (None, None), (labels.repeat_interleave(2)[::2], label_weights)):
        plain, fused = torch.empty_like(student), torch.empty_like(student)
        expected = kl_rows(student, teacher, weights, *given, terms, plain)
        rows = kl_rows_triton(student, teacher, weights, *given, terms, fused)
        counted = labels >= 0  # the cross entropy of a row without a label is not looked at
        torch.testing.assert_close(rows[:3], expected[:3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows[3][counted], expected[3][counted], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=2e-6)
        assert kl_rows_triton(student, teacher, weights, *given, terms, None)[0].equal(rows[0])
"""


def test_the_kernel_computes_what_plain_torch_does():
    """In Triton's interpreter; tests/gpu runs it compiled."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, cwd=Path(__file__).parents[3])
