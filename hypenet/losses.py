"""The next-token loss without logits: the head is applied in chunks, so no tensor of [tokens, vocabulary] exists.

While a chunk's logits exist, the gradients are computed as well; backward only scales them. `LinearGradients` does this
for stage 2's loss too (halo/losses/linear_kl.py).

    logits l_i = h_i W^T        loss = 1/n sum_i -log softmax(l_i)[label_i]
    d loss / d l_i = (softmax(l_i) - onehot(label_i)) / n

Logits and all after them are float32, also from operands in half precision, or float64 where the operands are.

N tokens, V words, D width, C tokens of a chunk, B batch, T tokens of a row.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import fused_kernel_serves, run_program, scale_
from .loss_kernels import cross_entropy_rows, row_block

IGNORE = -100
"""The label of a position without a target."""

CHUNK_BYTES = 1350 * 2**20
"""The most bytes on a GPU for the logits of a chunk and their gradient. Twice as much would make stage 3's loss at 16K
tokens 6% faster (`benchmarks.losses sizes`, H100)."""

GRADIENT = 2
"""A chunk has this many times the tokens whose logits live at a time: logits in float32 are large, but each of the two
products of their gradient reads or writes the whole head."""

FEW_CHUNKS = 8
"""Up to this many chunks, the head's gradient is summed in the head's precision, which saves a float32 copy. In bf16
that adds an error as large as the rounding of its operands; with more chunks it would grow."""


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, count: Tensor | float | None = None, chunk: int | None = None
) -> Tensor:
    """The cross entropy of the labels that are not IGNORE.

    What `fused_kernel_serves` (hypenet/fused.py), half precision on a GPU, has a kernel for what comes after the
    logits. All else, as on a CPU, has plain torch; so has a head of another dtype than the hidden states.

    Args:
        hidden: [N, D] final hidden states.
        head: [V, D].
        labels: [N] int64, already shifted: labels[i] is the token after position i.
        count: the divisor of the sum over labels. None: their number.
        chunk: tokens whose logits live at a time. None: as many as fit `CHUNK_BYTES`.

    Raises:
        RuntimeError: a label is no word. From the kernel, the loss is not a number then.
    """
    return _LinearCrossEntropy.apply(hidden, head, labels, count, chunk)


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss` with its arguments, from hidden states in place of logits.

    Args:
        hidden: [B, T, D] final hidden states.
        head: [V, D].
        labels: [B, T] int64: the input tokens, `ignore_index` where there is no target.
        num_items_in_batch: the divisor of the sum over targets, which gradient accumulation sets. None: their number.
        shift_labels: [B, T], the target of each position; in place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    if ignore_index != IGNORE:
        shift_labels = shift_labels.masked_fill(shift_labels == ignore_index, IGNORE)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(head.device)
    # A model spread over devices may have its head on another than its last layer.
    hidden, shift_labels = hidden.flatten(0, 1).to(head.device), shift_labels.flatten().to(head.device)
    return linear_cross_entropy(hidden, head, shift_labels, count=num_items_in_batch)


def exact_logits(hidden: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden [N, D] @ head [V, D] transposed, in float32 at least, as accumulated: not rounded to half precision.

    Args:
        out: [N, V], the tensor to write to.
    """
    if hidden.dtype in (torch.float16, torch.bfloat16):
        if hidden.is_cuda and head.dtype == hidden.dtype:
            return torch.mm(hidden, head.T, out_dtype=torch.float32, out=out)
        hidden, head = hidden.float(), head.float()
    logits = torch.mm(hidden, head.T, out=out)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast has its own way


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed in forward, while a chunk's logits exist, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, count: Tensor | float | None, chunk: int | None
    ) -> Tensor:
        share = _share(labels, count, torch.promote_types(hidden.dtype, torch.float32))
        fused = fused_kernel_serves(hidden) and head.dtype == hidden.dtype
        part, whole = chunk_sizes(hidden, len(head), chunk, live=1 if fused else 2)
        gradients = LinearGradients(hidden, head, len(head), whole, ctx.needs_input_grad)
        losses = _losses(gradients, hidden, head, labels, share, part, fused=fused)
        ctx.gradients = gradients.finished()
        return losses.sum() * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *handed_out(ctx, grad), None, None, None


def _losses(
    gradients: "LinearGradients", hidden: Tensor, head: Tensor, labels: Tensor, share: Tensor, part: int, *, fused: bool
) -> Tensor:
    """The loss of each token, [N], before its division; and the gradients."""
    losses = torch.empty_like(labels, dtype=share.dtype)
    # Plain torch has no buffer of logits: under autocast, a product with `out` is not what the model computes.
    buffer = hidden.new_empty(part, len(head), dtype=share.dtype) if fused else None
    rows_of = _rows_by_kernel if fused else _rows_plain
    for rows, to_logits in gradients.parts(part):
        out = None if buffer is None else buffer[: rows.stop - rows.start]
        losses[rows] = rows_of(exact_logits(hidden[rows], head, out), labels[rows], share, to_logits)
    return losses


def _share(labels: Tensor, count: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """1 / count, a scalar on the labels' device. The host does not wait for it."""
    if count is None:
        count = (labels != IGNORE).sum()
    if not isinstance(count, Tensor):
        count = torch.full((), count, device=labels.device, dtype=dtype)
    return count.to(labels.device, dtype).reciprocal()


def _rows_plain(logits: Tensor, labels: Tensor, share: Tensor, to_logits: Tensor | None) -> Tensor:
    """The loss of each row, [C], before its division; the gradient of its logits is written to `to_logits`.

    Args:
        logits: [C, V] float32 or float64.
        labels: [C] int64.
        share: scalar, the factor of each row in the loss.
        to_logits: [C, V] in the precision of the matrix products, or None: not wanted.
    """
    log_p = F.log_softmax(logits, dim=-1)
    ignored = (labels == IGNORE).unsqueeze(-1)
    target = labels.unsqueeze(-1).masked_fill(ignored, 0)
    losses = -log_p.gather(-1, target).masked_fill_(ignored, 0).squeeze(-1)
    if to_logits is not None:
        minus_one = -torch.ones_like(target, dtype=log_p.dtype)
        to_logits.copy_(log_p.exp_().scatter_add_(-1, target, minus_one).masked_fill_(ignored, 0).mul_(share))
    return losses


def _rows_by_kernel(logits: Tensor, labels: Tensor, share: Tensor, to_logits: Tensor | None) -> Tensor:
    """`_rows_plain` in one kernel, for float32 logits."""
    losses = torch.empty_like(labels, dtype=torch.float32)
    strides = logits.stride(0), 0 if to_logits is None else to_logits.stride(0)
    run_program(
        cross_entropy_rows,
        len(logits),
        *(logits, labels.contiguous(), share, losses, to_logits, logits.shape[1], *strides),
        IGNORED=IGNORE,
        HAS_GRADIENT=to_logits is not None,
        **row_block(logits.shape[1]),
    )
    return losses


def chunk_sizes(hidden: Tensor, words: int, chunk: int | None, *, live: int) -> tuple[int, int]:
    """(tokens whose logits live at a time, tokens of a chunk), for the tokens of `hidden`, [N, D].

    A chunk's gradient of logits lives at a time; there are `GRADIENT` times as many of them.

    Args:
        words: V.
        chunk: both, if they are given. None: as many as fit `CHUNK_BYTES` on a GPU.
        live: the float32 numbers that live for each logit.
    """
    tokens = max(1, len(hidden))
    if chunk is None and (hidden.is_cuda or hidden.is_meta):
        part = CHUNK_BYTES // (words * (live * 4 + GRADIENT * hidden.element_size()))
        part = max(128, part // 128 * 128)
        return min(part, tokens), min(GRADIENT * part, tokens)
    return (min(chunk or 1024, tokens),) * 2


class LinearGradients:
    """The gradients of a loss to hidden states and head, whose logits exist in chunks: `parts`, then `finished`.

    Args:
        hidden: [N, D].
        head: [V or more, D]; the rows after the first V have no logits, and a gradient of zero.
        words: V.
        whole: C, the tokens of a chunk.
        wanted: whether the gradient of `hidden` is, and that of `head`.
    """

    def __init__(self, hidden: Tensor, head: Tensor, words: int, whole: int, wanted: tuple[bool, ...]) -> None:
        self._hidden, self._dtype, self._whole = hidden, head.dtype, whole
        self._head = head[:words].to(hidden.dtype)
        self._to_hidden = torch.empty_like(hidden) if wanted[0] else None
        self._to_head = None
        if wanted[1]:
            few = len(hidden) <= FEW_CHUNKS * whole
            dtype = head.dtype if few else torch.promote_types(head.dtype, torch.float32)
            self._to_head = torch.empty_like(head, dtype=dtype)
            self._to_head[words if len(hidden) else 0 :] = 0
        self._to_logits = hidden.new_empty(whole, words) if wanted[0] or wanted[1] else None

    def parts(self, part: int) -> Iterator[tuple[slice, Tensor | None]]:
        """At most `part` tokens at a time: their rows, and where to write the gradient of their logits, if anywhere.

        What was written must stand there when the next is asked for.
        """
        for begin in range(0, len(self._hidden), self._whole):
            end = min(begin + self._whole, len(self._hidden))
            for first in range(begin, end, part):
                last = min(first + part, end)
                to_logits = self._to_logits
                yield slice(first, last), None if to_logits is None else to_logits[first - begin : last - begin]
            self._add(begin, end)

    def _add(self, begin: int, end: int) -> None:
        """The products of a chunk's gradient of logits."""
        if self._to_logits is None:
            return
        to_logits = self._to_logits[: end - begin]
        if self._to_hidden is not None:
            torch.mm(to_logits, self._head, out=self._to_hidden[begin:end])
        if self._to_head is not None:
            add_product(self._to_head[: len(self._head)], to_logits.T, self._hidden[begin:end], first=begin == 0)

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states and head, for `handed_out`. The memory of the logits' is free after this."""
        self._to_logits = None
        return self._to_hidden, None if self._to_head is None else self._to_head.to(self._dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b for the `first`; also if `total` has more precision than a and b."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.device.type == "cpu":
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    else:
        torch.addmm(total, a, b, beta=beta, out=total, out_dtype=total.dtype)


def handed_out(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In backward: the gradients that forward left in `ctx.gradients`, times `grad`, in their own memory: only once.

    Raises:
        RuntimeError: backward runs a second time.
    """
    if ctx.gradients is None:
        raise RuntimeError("This loss has no second backward: it gives away its gradients. Run forward again.")
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if gradient is None else scale_(gradient, grad) for gradient in gradients)
