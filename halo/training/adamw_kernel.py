"""The Triton kernel of halo/training/fused_step.py.

gradients           [n] int64: where a piece's gradient begins
pieces              [n, 6] int64: where its weight, the rounded copy of it, first and second moment begin, its number
                    of elements, and its place in `factors`
piece_of, begin_of  [programs] int32 and int64: a program's piece, and its first element there
step                a number: how many steps there are with this one
factors             gradients are divided by these, where they are CLIPPED
like                has the precision of gradients and rounded weights
ALIGNED             whether each piece begins at a multiple of 16 bytes, and has a multiple of 16 elements
"""

import triton
import triton.language as tl


@triton.jit
def adamw(  # type: ignore[no-untyped-def]
    gradients,
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
    """One step of AdamW, in float32. Program i does LANES x LOOPS elements of one piece (see above)."""
    program = tl.program_id(0)
    index = tl.load(piece_of + program)
    piece = pieces + index * 6
    gradient = _pointer(gradients + index, like, ALIGNED)
    master = _pointer(piece, step, ALIGNED)
    weight = _pointer(piece + 1, like, ALIGNED)
    first = _pointer(piece + 2, step, ALIGNED)
    second = _pointer(piece + 3, step, ALIGNED)
    size = tl.load(piece + 4)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    begin = tl.multiple_of(tl.load(begin_of + program), LANES)
    factor = 1.0
    if CLIPPED:
        factor = tl.load(factors + tl.load(piece + 5))
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


@triton.jit
def _pointer(place, like, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer that is stored at `place`, to what `like` points to; ALIGNED: to a multiple of 16 bytes."""
    pointer = tl.load(place).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
