"""The next-token loss without logits: the head is applied in chunks, so no tensor of [tokens, vocabulary] exists.

    logits l_i = h_i W^T        loss = 1/n sum_i -log softmax(l_i)[label_i]
    d loss / d l_i = (softmax(l_i) - onehot(label_i)) / n

Logits and all after them are float32, also from operands in half precision, or float64 where the operands are.

N tokens, V words, D width, B batch, T tokens of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import scale_

IGNORE = -100
"""The label of a position without a target."""


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, count: Tensor | float | None = None, chunk: int = 1024
) -> Tensor:
    """The cross entropy of the labels that are not IGNORE.

    Args:
        hidden: [N, D] final hidden states.
        head: [V, D].
        labels: [N] int64, already shifted: labels[i] is the token after position i.
        count: the divisor of the sum over labels. None: their number.
        chunk: tokens whose logits live at a time.
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
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, count: Tensor | float | None, chunk: int
    ) -> Tensor:
        divisor = (labels != IGNORE).sum() if count is None else count
        grads = LinearGradients(hidden, head)
        loss = torch.zeros((), device=hidden.device, dtype=grads.dtype)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            log_p = F.log_softmax(exact_logits(hidden[rows], head), dim=-1)
            ignored = (labels[rows] == IGNORE).unsqueeze(-1)
            target = labels[rows].unsqueeze(-1).masked_fill(ignored, 0)
            loss -= log_p.gather(-1, target).masked_fill(ignored, 0).sum()
            to_logits = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=log_p.dtype))
            grads.add(rows, to_logits.masked_fill_(ignored, 0).div_(divisor))
        grads.save(ctx)
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *handed_out(ctx, grad), None, None, None


class LinearGradients:
    """The gradients of a chunked loss to its hidden states and its head, summed chunk by chunk.

    Attributes:
        dtype: of everything after the logits, and of the head's gradient while it is summed.
    """

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self.hidden, self.head = hidden, head
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.to_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        self.to_head = torch.zeros_like(head, dtype=self.dtype) if head.requires_grad else None

    def add(self, rows: slice, to_logits: Tensor) -> None:
        """Add a chunk: `rows` of the tokens, and the gradient of their logits."""
        to_logits = to_logits.to(self.hidden.dtype)
        if self.to_hidden is not None:
            self.to_hidden[rows] = to_logits @ self.head
        if self.to_head is not None:
            self.to_head += to_logits.T @ self.hidden[rows]

    def save(self, ctx: Any) -> None:
        """Keep the gradients for `handed_out` in backward."""
        ctx.gradients = (self.to_hidden, None if self.to_head is None else self.to_head.to(self.head.dtype))


def handed_out(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In backward: the gradients that forward left in `ctx.gradients`, times `grad`, in their own memory: only once.

    Raises:
        RuntimeError: backward runs a second time.
    """
    if ctx.gradients is None:
        raise RuntimeError("This loss has no second backward: it gives away its gradients. Run forward again.")
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if gradient is None else scale_(gradient, grad) for gradient in gradients)
