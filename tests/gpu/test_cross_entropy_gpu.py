"""The next-token loss's kernel on a GPU, against float64 from the same half-precision operands."""

import pytest
import torch
import torch.nn.functional as F

from hypenet import losses
from hypenet.losses import IGNORE, linear_cross_entropy
from tests.hypenet.test_losses import operands, relative_errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOLERANCE = 0.006
"""Of the norm: gradients pass through bf16 once as logits' and once as their own; the head's also as sums of chunks."""


@pytest.mark.parametrize(
    ("words", "dtype"),  # no multiples of a block, and multiples
    [(97, torch.bfloat16), (30_001, torch.bfloat16), (32_768, torch.bfloat16), (2048, torch.float16)],
)
@pytest.mark.parametrize("options", [{}, {"chunk": 128}, {"chunk": 999, "count": 61.0}], ids=str)
def test_loss_and_gradients(words, options, dtype):
    """1,300 tokens: one chunk, 11 (a sum in float32), and 2 (a sum in bf16), the last of which is not full."""
    hidden, head, labels = operands(1300, words, dtype=dtype, device="cuda", width=64)
    assert losses.fused_kernel_serves(hidden)
    error, *gradients = relative_errors(hidden.requires_grad_(), head.requires_grad_(), labels, **options)
    assert error < 1e-5
    assert len(gradients) == 2 and all(x < TOLERANCE for x in gradients)


@pytest.mark.parametrize(("most_lanes", "warps"), [(1024, 4), (4096, 16), (4096, 32), (8192, 32)])
def test_a_row_may_be_cut_in_other_ways(monkeypatch, most_lanes, warps):
    monkeypatch.setattr("hypenet.loss_kernels.MOST_LANES", most_lanes)
    monkeypatch.setattr("hypenet.loss_kernels.WARPS", warps)
    hidden, head, labels = operands(300, 30_001, device="cuda", width=64)
    error, *gradients = relative_errors(hidden.requires_grad_(), head.requires_grad_(), labels)
    assert error < 1e-5 and all(x < TOLERANCE for x in gradients)


def test_the_kernel_computes_what_plain_torch_does(monkeypatch):
    results = []
    for serves in (losses.fused_kernel_serves, lambda x: False):
        monkeypatch.setattr(losses, "fused_kernel_serves", serves)
        hidden, head, labels = operands(1300, 30_001, device="cuda", width=64)
        loss = linear_cross_entropy(hidden.requires_grad_(), head.requires_grad_(), labels)
        (0.5 * loss).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for fused, plain in zip(*results, strict=True):
        assert (fused.double() - plain.double()).norm() < TOLERANCE * plain.double().norm()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)


def test_a_label_that_is_no_word_shows():
    hidden, head, labels = operands(300, 30_001, device="cuda", width=64)
    for label in (-1, 30_001):
        labels[5] = label
        assert linear_cross_entropy(hidden, head, labels).isnan()


def test_tokens_without_labels_have_no_gradient():
    hidden, head, labels = operands(300, 30_001, device="cuda", width=64)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, head, labels).backward()
    assert not hidden.grad[labels == IGNORE].any() and hidden.grad[labels != IGNORE].any(dim=-1).all()


def peak(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_it_needs_a_chunk_and_the_gradients_and_less_than_full_logits():
    hidden, head, labels = operands(8192, 151_936, device="cuda", width=256)
    hidden.requires_grad_(), head.requires_grad_()
    fused = peak(lambda: linear_cross_entropy(hidden, head, labels).backward())
    hidden.grad = head.grad = None
    full = peak(lambda: F.cross_entropy((hidden @ head.T).float(), labels, ignore_index=IGNORE).backward())
    logits = 2 * len(hidden) * len(head)
    assert fused < losses.CHUNK_BYTES + hidden.nbytes + 2 * head.nbytes < logits < full
