"""Labels: the loss without logits is the loss that any model has, and its gradients."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening

from hypenet import losses
from hypenet.losses import IGNORE, LinearGradients, chunk_sizes, linear_cross_entropy


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.fixture
def labels(tokens):
    labels = tokens.clone()
    labels[0, :20] = labels[1, 33:37] = IGNORE
    return labels


def plain_loss(logits, labels, count=None):
    """The shifted cross entropy of float64 logits, which transformers' own would round."""
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != IGNORE).sum() if count is None else count)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [None, 61, torch.tensor(61)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_the_logits(make_hybrid, tokens, labels, tied, count):
    model = make_hybrid(tie_word_embeddings=tied).double().train()
    output = model(tokens, labels=labels, **({} if count is None else {"num_items_in_batch": count}))
    assert output.logits is None
    expected = plain_loss(model(tokens).logits, labels, count)
    exact(output.loss, expected)
    exact(gradients(model, 3 * output.loss), gradients(model, 3 * expected))


def test_evaluation_gives_logits_and_the_same_loss(make_hybrid, tokens, labels):
    model = make_hybrid()
    trained = model.train()(tokens, labels=labels).loss
    output = model.eval()(tokens, labels=labels)
    assert output.logits.shape == (2, 50, 61)
    torch.testing.assert_close(output.loss, trained)
    torch.testing.assert_close(output.loss, plain_loss(output.logits, labels))


def test_accumulated_micro_batches_are_the_batch(make_hybrid, tokens, labels):
    model = make_hybrid().double().train()
    count = (labels[:, 1:] != IGNORE).sum()
    whole = gradients(model, model(tokens, labels=labels).loss)
    model.zero_grad()
    for row in range(2):
        rows = slice(row, row + 1)
        model(tokens[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    exact({name: parameter.grad for name, parameter in model.named_parameters()}, whole)
    # How transformers' Trainer learns that it may pass the count, and which columns of a data set to keep.
    parameters = inspect.signature(model.forward).parameters
    assert any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    assert {"input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep"} <= parameters.keys()


def test_labels_can_be_shifted_already_or_ignored_by_another_number(make_hybrid, tokens, labels):
    for model in (make_hybrid().train(), make_hybrid().eval()):
        expected = model(tokens, labels=labels).loss
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        torch.testing.assert_close(model(tokens, labels=labels, shift_labels=shifted).loss, expected)
        other = labels.masked_fill(labels == IGNORE, 60_000)
        torch.testing.assert_close(model(tokens, labels=other, ignore_index=60_000).loss, expected)


def test_who_asks_for_logits_in_training_gets_them(make_hybrid, tokens, labels):
    model = make_hybrid().train()
    output = model(tokens, labels=labels[:, -7:], logits_to_keep=7)
    assert output.logits.shape == (2, 7, 61)
    torch.testing.assert_close(output.loss, plain_loss(output.logits, labels[:, -7:]))
    assert model(tokens).logits.shape == (2, 50, 61)


def test_another_head_or_loss_is_not_passed_over(make_hybrid, tokens, labels):
    model = make_hybrid().train()
    expected = model(tokens, labels=labels).loss

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = Adapted
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, plain_loss(output.logits, labels))
    assert not torch.allclose(output.loss, expected)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.loss, output.logits.sum())


@pytest.mark.parametrize("training", [True, False])
def test_the_first_token_of_a_document_is_no_target(make_hybrid, tokens, training):
    """The loss of packed documents is that of each alone: as transformers' collator labels them, and unasked."""
    model = make_hybrid().double().train(training)
    documents = [tokens[0, :23].tolist(), tokens[0, 23:27].tolist(), tokens[1].tolist()]
    losses = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents]
    expected = sum(losses) / sum(len(d) - 1 for d in documents)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": d} for d in documents])
    tolerance = {"rtol": 0, "atol": 1e-10 if training else 1e-6}  # transformers' own loss is in float32
    torch.testing.assert_close(model(**batch).loss, expected, **tolerance, check_dtype=False)
    torch.testing.assert_close(
        model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["input_ids"]).loss,
        expected,
        **tolerance,
        check_dtype=False,
    )


def test_autocast_computes_as_it_does_with_logits(make_hybrid, tokens, labels):
    model = make_hybrid().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=labels).loss
        expected = plain_loss(model(tokens).logits.float(), labels)
    torch.testing.assert_close(loss, expected)
    actual, reference = gradients(model, loss), gradients(model, expected)
    for name, value in actual.items():
        assert (value - reference[name]).norm() < 0.05 * reference[name].norm(), name


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits():
    hidden, head = torch.randn(700, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, head, torch.arange(700) % 97, chunk=64).backward()
    assert largest.numel == hidden.numel() > 64 * 97


def test_a_label_that_is_no_token_is_an_error():
    for label in (-1, 97):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(torch.randn(3, 16), torch.randn(97, 16), torch.tensor([0, label, IGNORE]))


def test_the_gradients_are_given_away_once():
    hidden = torch.randn(3, 16, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(97, 16), torch.arange(3))
    (0.5 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


@pytest.mark.parametrize("chunk", [64, 4096])
def test_the_loss_alone_is_the_plain_one_also_from_half_precision(chunk):
    """700 tokens are no multiple of a chunk; every seventh has no label."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((700, 16), (97, 16)))
    labels = torch.randint(0, 97, (700,), generator=generator)
    labels[::7] = IGNORE
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=IGNORE)
    expected.backward()
    for x in (hidden, head):
        x.requires_grad_()
    loss = linear_cross_entropy(hidden, head, labels, chunk=chunk)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for x, x_exact in zip((hidden, head), exact, strict=True):
        assert (x.grad.double() - x_exact.grad).norm() < 0.005 * x_exact.grad.norm()


def operands(tokens, words, dtype=torch.bfloat16, device="cpu", width=16):
    """Hidden states, head and labels; every seventh token has no label."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator) for shape in ((tokens, width), (words, width)))
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[::7], labels[-1] = IGNORE, words - 1
    return hidden.to(device, dtype), (2 * head / width**0.5).to(device, dtype), labels.to(device)


def relative_errors(hidden, head, labels, **options):
    """Of the loss and of the gradients that are wanted, relative to float64."""
    count = options.get("count")
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, head)]
    total = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=IGNORE, reduction="sum")
    expected = total / ((labels != IGNORE).sum() if count is None else count)
    loss = linear_cross_entropy(hidden, head, labels, **options)
    pairs = [(loss.detach(), expected.detach())]
    if expected.requires_grad:
        expected.backward()
        (loss * 1).backward()
        pairs += [(x.grad, y.grad) for x, y in zip((hidden, head), exact, strict=True) if x.requires_grad]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def compare_the_kernel():
    """In Triton's interpreter, where a GPU would be: 4,999 words are no multiple of a block of 2,048."""
    losses.fused_kernel_serves = lambda x: True
    for options in ({}, {"count": 61}, {"count": torch.tensor(61)}, {"chunk": 8}, {"chunk": 21}):
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            hidden, head, labels = operands(22, 4999)
            error, *gradients = relative_errors(
                hidden.requires_grad_(wanted[0]), head.requires_grad_(wanted[1]), labels, **options
            )
            assert error < 1e-5, (options, error)
            assert len(gradients) == sum(wanted) and all(x < 0.006 for x in gradients), (options, gradients)
    for words in (1, 97, 2048, 2049):  # a block, and what is beside one
        hidden, head, labels = operands(5, words, dtype=torch.float32)
        errors = relative_errors(hidden.requires_grad_(), head, labels)
        assert words == 1 or all(x < 1e-5 for x in errors), (words, errors)
    hidden, head, labels = operands(9, 97)
    apart = torch.stack([labels, labels + 1], dim=1)[:, 0]
    assert linear_cross_entropy(hidden, head, apart) == linear_cross_entropy(hidden, head, labels)
    labels[3] = -1
    assert linear_cross_entropy(hidden, head, labels).isnan()
    labels[3] = 97
    assert linear_cross_entropy(hidden, head, labels).isnan()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, head, torch.full_like(labels, IGNORE), count=9).backward()
    assert not hidden.grad.any()


def test_the_kernel_computes_what_plain_torch_does():
    """tests/gpu/test_cross_entropy_gpu.py runs it compiled."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = "from tests.hypenet.test_losses import compare_the_kernel; compare_the_kernel()"
    subprocess.run([sys.executable, "-c", run], check=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("chunks", "tolerance"), [(1, 0.004), (8, 0.006), (9, 0.004), (100, 0.004)])
def test_the_heads_gradient_does_not_decay_with_more_chunks(chunks, tolerance):
    """Up to 8 are summed in bf16, more in float32."""
    hidden, head, labels = operands(16 * chunks, 97)
    _, error = relative_errors(hidden, head.requires_grad_(), labels, chunk=16)
    assert error < tolerance


def test_chunks_fit_their_bytes(monkeypatch):
    """On a GPU, and so where a plan has the meta device stand for one."""
    for tokens, words, live in ((16_384, 151_936, 1), (16_384, 151_936, 2), (6_144, 151_936, 5), (4_096, 49_152, 1)):
        hidden = torch.empty(tokens, 2048, dtype=torch.bfloat16, device="meta")
        part, whole = chunk_sizes(hidden, words, None, live=live)
        assert part % 128 == 0 and part <= whole <= 2 * part
        held = words * (4 * live * part + 2 * whole)
        assert held <= losses.CHUNK_BYTES < held + 128 * words * (4 * live + 4) or whole == tokens
        monkeypatch.setattr(losses, "CHUNK_BYTES", losses.CHUNK_BYTES // 2)
        assert chunk_sizes(hidden, words, None, live=live)[0] <= part
        monkeypatch.undo()
    assert chunk_sizes(hidden, 10**9, None, live=1) == (128, 256)
    assert chunk_sizes(torch.empty(100, 16), 97, None, live=1) == chunk_sizes(hidden[:100], 97, None, live=1)
    assert chunk_sizes(torch.empty(5000, 16), 97, None, live=1) == (1024, 1024)


def test_no_tokens_have_gradients_of_zero():
    hidden, head, labels = (x[:0] if len(x) == 5 else x for x in operands(5, 97))
    linear_cross_entropy(hidden, head.requires_grad_(), labels, count=1).backward()
    assert head.grad.shape == head.shape and not head.grad.any()


def test_parts_of_a_chunk_are_put_together_before_its_products():
    """Chunks of 6 tokens, whose logits are made 4 at a time; the last chunk is not full."""
    hidden, head = torch.randn(17, 3), torch.randn(5, 3)
    given = torch.randn(17, 5)
    gradients, seen = LinearGradients(hidden, head, 5, 6, (True, True)), []
    for rows, to_logits in gradients.parts(4):
        to_logits.copy_(given[rows])
        seen.append((rows.start, rows.stop))
    assert seen == [(0, 4), (4, 6), (6, 10), (10, 12), (12, 16), (16, 17)]
    to_hidden, to_head = gradients.finished()
    torch.testing.assert_close(to_hidden, given @ head)
    torch.testing.assert_close(to_head, given.T @ hidden)
