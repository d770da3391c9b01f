"""The losses of the three stages. No tensor of [tokens, vocabulary] exists at once: the head is applied in chunks.

Logits are products in the operands' precision (bf16 on a GPU, accumulated in fp32 and rounded); all after is fp32.

N tokens, V words, D student width, E teacher width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A label that takes no part in the cross entropy."""


def alignment_mse(output: Tensor, target: Tensor) -> Tensor:
    """Stage 1's loss (Eq. 7): the mean squared error of a layer's output, in fp32.

    Args:
        output, target: [..., D].
    """
    return F.mse_loss(output.float(), target.float())


def linear_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2's loss (Eq. 10): KL(teacher || student) at temperature 1, mean over tokens.

    Args:
        hidden: [N, D] the student's final hidden states.
        head: [V, D] the student's output head.
        teacher_hidden: [N, E], frozen.
        teacher_head: [V, E], frozen.
        chunk: tokens whose logits live at a time.

    Returns:
        (loss, metrics): a scalar, and `agreement` (top-1, of the tokens) and `teacher_entropy` (nats), detached.
    """
    loss, agreement, entropy = _LinearKL.apply(hidden, head, teacher_hidden, teacher_head, chunk)
    return loss, {"agreement": agreement, "teacher_entropy": entropy}


def linear_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """Stage 3's loss: next-token cross entropy, mean over the labels that are not IGNORE.

    Args:
        hidden: [N, D] final hidden states.
        head: [V, D].
        labels: [N] int64, already shifted: labels[i] is the token after position i.
    """
    return _LinearCrossEntropy.apply(hidden, head, labels, chunk)


class _LinearKL(torch.autograd.Function):
    """The gradients are made in forward, while a chunk's logits exist, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        grads = _Gradients(hidden, head)
        loss, agreement, entropy = (torch.zeros((), device=hidden.device) for _ in range(3))
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            student = F.log_softmax((hidden[rows] @ head.T).float(), dim=-1)
            teacher = F.log_softmax((teacher_hidden[rows] @ teacher_head.T).float(), dim=-1)
            p = teacher.exp()
            agreement += (student.argmax(-1) == teacher.argmax(-1)).sum()
            cross = (p * student).sum()
            negentropy = (p * teacher).sum()
            loss += negentropy - cross
            entropy -= negentropy
            grads.add(rows, student.exp_().sub_(p).div_(tokens))
        grads.save(ctx)
        ctx.mark_non_differentiable(agreement, entropy)
        return loss / tokens, agreement / tokens, entropy / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_Gradients.scaled(ctx, grad), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
        tokens = (labels != IGNORE).sum()
        grads = _Gradients(hidden, head)
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            log_p = F.log_softmax((hidden[rows] @ head.T).float(), dim=-1)
            counted = (labels[rows] != IGNORE).unsqueeze(-1)
            target = labels[rows].clamp(min=0).unsqueeze(-1)
            loss -= (log_p.gather(-1, target) * counted).sum()
            grads.add(
                rows,
                (log_p.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=log_p.dtype)) * counted).div_(
                    tokens
                ),
            )
        grads.save(ctx)
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradients.scaled(ctx, grad), None, None


class _Gradients:
    """The gradients of a chunked loss to its hidden states and its head, gathered chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Tensor):
        self.hidden, self.head = hidden, head
        self.to_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        self.to_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None

    def add(self, rows: slice, to_logits: Tensor) -> None:
        to_logits = to_logits.to(self.hidden.dtype)
        if self.to_hidden is not None:
            self.to_hidden[rows] = to_logits @ self.head
        if self.to_head is not None:
            self.to_head += to_logits.T @ self.hidden[rows]

    def save(self, ctx: Any) -> None:
        ctx.gradients = (self.to_hidden, None if self.to_head is None else self.to_head.to(self.head.dtype))

    @staticmethod
    def scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        to_hidden, to_head = ctx.gradients
        return (
            None if to_hidden is None else to_hidden.mul_(grad),
            None if to_head is None else to_head.mul_(grad),
        )
