"""The Triton kernel of halo/teacher/fp8.py: a row is read once, and written in e4m3 with its scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypenet.fused import run_program


@triton.jit
def _quantise_row(x, rows, scales, width, LARGEST: tl.constexpr, TINY: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program i does row i. The divisions round as torch's do: then the codes are the reference's."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    there = lane < width
    values = tl.load(x + row * width + lane, mask=there, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values)), TINY)
    factor = tl.div_rn(tl.full((), LARGEST, tl.float32), largest)
    tl.store(rows + row * width + lane, (values * factor).to(tl.float8e4nv), mask=there)
    tl.store(scales + row, tl.div_rn(largest, tl.full((), LARGEST, tl.float32)))


def quantise_rows_triton(x: Tensor, largest: float, tiny: float) -> tuple[Tensor, Tensor]:
    """`halo.teacher.fp8.quantise_rows` of at most hypenet.fused.WIDEST columns."""
    x = x.contiguous()
    count, width = x.shape
    rows, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(count, 1, dtype=torch.float32)
    lanes = triton.next_power_of_2(width)
    warps = min(16, max(1, lanes // 256))  # 8 elements a thread up to 4,096 lanes, 32 at most
    run_program(_quantise_row, count, x, rows, scales, width, warps=warps, LARGEST=largest, TINY=tiny, LANES=lanes)
    return rows, scales
