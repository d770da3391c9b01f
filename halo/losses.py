"""The losses of the three stages. No tensor of [tokens, vocabulary] exists at once: the head is applied in chunks.

Stage 3's is hypenet's own next-token loss. Logits are products in the operands' precision (bf16 on a GPU, accumulated
in fp32 and rounded); all after is fp32.

N tokens, V words, D student width, E teacher width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypenet.losses import IGNORE, LinearGradients, linear_cross_entropy

__all__ = ["IGNORE", "alignment_mse", "linear_cross_entropy", "linear_kl"]


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


class _LinearKL(torch.autograd.Function):
    """The gradients are made in forward, while a chunk's logits exist, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.shape[0]
        grads = LinearGradients(hidden, head)
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
        return *LinearGradients.scaled(ctx, grad), None, None, None
