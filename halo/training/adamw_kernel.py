"""The Triton kernel of halo/training/fused_step.py."""

import triton
import triton.language as tl


@triton.jit
def adamw(  # type: ignore[no-untyped-def]
    pieces,
    piece_of,
    begin_of,
    step,
    factors,
    like,
    lr,
    log_beta_1,
    log_beta_2,
    eps,
    decay,
    CLIPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """One step of AdamW, in float32. Program i does LANES x LOOPS elements of one piece.

    Args:
        pieces: [n, 7] int64: where a piece's gradient, weight, its rounded copy, first and second moment begin, its
            number of elements, and its place in `factors`.
        piece_of, begin_of: [programs] int32 and int64: a program's piece, and its first element there.
        step: a number: how many steps there are with this one.
        factors: gradients are divided by these, where they are CLIPPED.
        like: has the precision of gradients and rounded weights.
        ALIGNED: whether each piece begins at a multiple of 16 bytes, and has a multiple of 16 elements.
    """
    program = tl.program_id(0)
    piece = pieces + tl.load(piece_of + program) * 7
    gradient = tl.load(piece).to(tl.pointer_type(like.dtype.element_ty))
    master = tl.load(piece + 1).to(tl.pointer_type(tl.float32))
    weight = tl.load(piece + 2).to(tl.pointer_type(like.dtype.element_ty))
    first = tl.load(piece + 3).to(tl.pointer_type(tl.float32))
    second = tl.load(piece + 4).to(tl.pointer_type(tl.float32))
    size = tl.load(piece + 5)
    begin = tl.multiple_of(tl.load(begin_of + program), LANES)
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
        master = tl.multiple_of(master, 16)
        weight = tl.multiple_of(weight, 16)
        first = tl.multiple_of(first, 16)
        second = tl.multiple_of(second, 16)
        size = tl.multiple_of(size, 16)
    factor = 1.0
    if CLIPPED:
        factor = tl.load(factors + tl.load(piece + 6))
    count = tl.load(step)
    beta_1 = tl.exp(log_beta_1)
    beta_2 = tl.exp(log_beta_2)
    rate = lr / (1 - tl.exp(count * log_beta_1))
    correction = 1 - tl.exp(count * log_beta_2)
    for loop in range(LOOPS):
        place = begin + loop * LANES + tl.arange(0, LANES)
        there = place < size
        g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32) / factor
        m = tl.load(first + place, mask=there, other=0.0)
        v = tl.load(second + place, mask=there, other=0.0)
        p = tl.load(master + place, mask=there, other=0.0)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        p = p * (1 - lr * decay) - rate * m / (tl.sqrt(v / correction) + eps)
        tl.store(first + place, m, mask=there)
        tl.store(second + place, v, mask=there)
        tl.store(master + place, p, mask=there)
        tl.store(weight + place, p.to(weight.dtype.element_ty), mask=there)
