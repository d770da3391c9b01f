"""The Triton kernel of halo/training/fused_step.py."""

import triton
import triton.language as tl


@triton.jit
def adamw(  # type: ignore[no-untyped-def]
    gradient,
    master,
    first,
    second,
    weight,
    step,
    factor,
    lr,
    log_beta_1,
    log_beta_2,
    eps,
    decay,
    size,
    CLIPPED: tl.constexpr,
    LANES: tl.constexpr,
):
    """One step of AdamW for `size` elements, in float32; `weight` is the rounded copy of `master`.

    Args:
        gradient: divided by `factor`, a number in memory, where it is CLIPPED.
        step: a number in memory: how many steps there are with this one.
    """
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = place < size
    g = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    if CLIPPED:
        g = g / tl.load(factor)
    count = tl.load(step)
    beta_1, beta_2 = tl.exp(log_beta_1), tl.exp(log_beta_2)
    m = tl.load(first + place, mask=there, other=0.0)
    v = tl.load(second + place, mask=there, other=0.0)
    p = tl.load(master + place, mask=there, other=0.0)
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g * g
    size_of_step = lr / (1 - tl.exp(count * log_beta_1))
    p = p * (1 - lr * decay) - size_of_step * m / (tl.sqrt(v / (1 - tl.exp(count * log_beta_2))) + eps)
    tl.store(first + place, m, mask=there)
    tl.store(second + place, v, mask=there)
    tl.store(master + place, p, mask=there)
    tl.store(weight + place, p.to(weight.dtype.element_ty), mask=there)
