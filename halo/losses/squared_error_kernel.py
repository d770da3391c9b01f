"""The Triton kernel of halo.losses.squared_error: reads output and target, writes the gradient and a sum a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SQUARED_ERROR_PROGRAMS = 1056
SQUARED_ERROR_BLOCK = 4096


@triton.jit
def _squared_error(  # type: ignore[no-untyped-def]
    output, target, gradient, errors, squares, size, twice_share, BLOCK: tl.constexpr
):
    error = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        t = tl.load(target + place, mask=place < size, other=0.0).to(tl.float32)
        d = tl.load(output + place, mask=place < size, other=0.0).to(tl.float32) - t
        tl.store(gradient + place, (d * twice_share).to(gradient.dtype.element_ty), mask=place < size)
        error += d * d
        square += t * t
    tl.store(errors + tl.program_id(0), tl.sum(error))
    tl.store(squares + tl.program_id(0), tl.sum(square))


def squared_error_triton(output: Tensor, target: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`halo.losses.squared_error`'s two means, and into `gradient` that of `output`."""
    output, target, size = output.contiguous(), target.contiguous(), output.numel()
    programs = min(SQUARED_ERROR_PROGRAMS, triton.cdiv(size, SQUARED_ERROR_BLOCK))
    sums = torch.empty(2, programs, device=output.device)
    _squared_error[(programs,)](output, target, gradient, *sums, size, 2 / size, BLOCK=SQUARED_ERROR_BLOCK, num_warps=8)
    error, square = (sums.sum(1) / size).unbind()
    return error, square
