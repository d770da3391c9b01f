"""The Triton kernel of hypenet/losses.py, and what it shares with stage 2's (halo/losses/linear_kl_kernel.py).

One program computes one row of logits. The row does not fit into its registers (151,936 words in float32 are 594 KiB),
so it is read twice. In the first sweep, each lane of the block keeps the maximum and the sum of exponentials of the
words that it has seen. The second sweep writes the gradient; it begins at the end, which is still in the cache.

How a row is cut follows from its length, so that nothing is tuned at run time.
"""

from __future__ import annotations

from .fused_kernels import jit

try:
    import triton.language as tl
except ImportError:  # nothing here is called then
    tl = None

MOST_LANES = 4096
"""The most words of a row that are read at a time."""
WARPS = 16
"""The most warps of a program."""
LANES_PER_WARP = 128
"""The fewest words that a warp reads at a time: 16 bytes a thread."""


def row_block(words: int) -> dict[str, int]:
    """How a program cuts a row of `words` logits: the constant BLOCK, and its `warps`."""
    block = min(MOST_LANES, 1 << (words - 1).bit_length())
    return {"BLOCK": block, "warps": max(1, min(WARPS, block // LANES_PER_WARP))}


@jit
def grown(top, x, per_unit):  # type: ignore[no-untyped-def]
    """(m, 2^(u (top - m)), 2^(u (x - m))), where m is the larger of `top` and `x`, and u is `per_unit`.

    The last two are the factors of a sum up to now and of a new summand. One of them is 1: the other costs the only
    exponential.
    """
    smaller = tl.exp2(-tl.abs(x - top) * per_unit)
    return tl.maximum(top, x), tl.where(x > top, smaller, 1.0), tl.where(x > top, 1.0, smaller)


@jit
def cross_entropy_rows(  # type: ignore[no-untyped-def]
    logits,
    labels,
    share,
    losses,
    gradient,
    words,
    logits_stride,
    gradient_stride,
    IGNORED: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of a row, and into `gradient` that of its logits, times `share`. Both are 0 if its label is IGNORED."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    if HAS_GRADIENT:
        gradient += row * gradient_stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if HAS_GRADIENT:
            nothing = tl.zeros((BLOCK,), gradient.dtype.element_ty)
            for place in range(0, words, BLOCK):
                tl.store(gradient + place + lanes, nothing, mask=place + lanes < words)
    else:
        # A very small number in place of minus infinity: the difference of two is still a number.
        top = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, words, BLOCK):
            v = begin + lanes
            x = tl.load(logits + v, mask=v < words, other=-1e30)
            top, fade, summand = grown(top, x, LOG2_E)
            total = total * fade + summand
        highest = tl.max(top)
        log_z = tl.log(tl.sum(total * tl.exp2((top - highest) * LOG2_E))) + highest
        # A label that is no word shows, in place of reading what lies beside the row.
        is_word = (label >= 0) & (label < words)
        tl.store(losses + row, log_z - tl.load(logits + label, mask=is_word, other=float("nan")))
        if HAS_GRADIENT:
            factor = tl.load(share)
            for back in range(0, words, BLOCK):
                v = (words - 1 - back) // BLOCK * BLOCK + lanes
                x = tl.load(logits + v, mask=v < words, other=-1e30, eviction_policy="evict_first")
                d = factor * (tl.exp2((x - log_z) * LOG2_E) - tl.where(v == label, 1.0, 0.0))
                tl.store(gradient + v, d.to(gradient.dtype.element_ty), mask=v < words, eviction_policy="evict_first")
