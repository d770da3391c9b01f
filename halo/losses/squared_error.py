"""Stage 1's loss (Eq. 7): the mean squared error of a layer's output, made with its gradient in one pass."""

from typing import Any

import torch
from torch import Tensor

from hypenet.kernels import has_triton
from hypenet.losses import handed_out


def squared_error(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean of (output - target)^2, the mean of target^2), two scalars in float32 at least.

    It has one backward, which gives away the gradient that forward made.

    Args:
        output: any shape; gradients flow to it, from the first of the two.
        target: the same shape and dtype, frozen.
    """
    return _SquaredError.apply(output, target)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
        error, square = (
            _kernel(output, target, gradient)
            if output.is_cuda and has_triton()
            else _squared_error_plain(output, target, gradient)
        )
        ctx.gradients = (gradient,)
        ctx.mark_non_differentiable(square)
        return error, square

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *handed_out(ctx, grad), None


def _squared_error_plain(output: Tensor, target: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The two means in plain torch; the gradient is written to `gradient`."""
    wide = torch.promote_types(output.dtype, torch.float32)
    difference, target = output.to(wide) - target.to(wide), target.to(wide)
    gradient.copy_(difference * (2 / difference.numel()))
    return difference.square().mean(), target.square().mean()


def _kernel(output: Tensor, target: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    from halo.losses.squared_error_kernel import squared_error_triton  # Triton does not exist on every machine

    return squared_error_triton(output, target, gradient)
