"""Triton kernels of hypenet/fused.py. Each reads its inputs once and writes its outputs once, in float32 between.

For the gradient of weights, few programs loop over many rows each, and each writes one partial sum.

Shapes: N tokens, H heads, D their width, W the width of a row; halves are the two parts that RoPE turns together.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # nothing here is called then
    triton = None


def jit(function: Any) -> Any:
    """triton.jit, where there is Triton. Elsewhere the kernel is never called."""
    return function if triton is None else triton.jit(function)


@jit
def turn_forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    cos,
    sin,
    y,
    tokens,
    cos_stride,
    eps,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """One token: all its heads, normed and turned."""
    token = tl.program_id(0).to(tl.int64)
    heads, half = tl.arange(0, LANES)[:, None], tl.arange(0, HALF)[None, :]
    place = token * HEADS * 2 * HALF + heads * 2 * HALF + half
    there = (heads < HEADS) & (half < HALF)
    a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + place + HALF, mask=there, other=0.0).to(tl.float32)
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * HALF) + eps)
        a = a * scale * tl.load(weight + half).to(tl.float32)
        b = b * scale * tl.load(weight + HALF + half).to(tl.float32)
    if ROPE:
        angle = token // tokens * cos_stride + token % tokens * 2 * HALF + half
        cos_a, cos_b = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + HALF).to(tl.float32)
        sin_a, sin_b = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + HALF).to(tl.float32)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y + place, a.to(y.dtype.element_ty), mask=there)
    tl.store(y + place + HALF, b.to(y.dtype.element_ty), mask=there)


@jit
def turn_backward(  # type: ignore[no-untyped-def]
    x,
    weight,
    cos,
    sin,
    to_y,
    to_x,
    to_weight,
    count,
    tokens,
    cos_stride,
    eps,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Program i does tokens i, i + programs, ... `to_weight` is [programs, D]."""
    heads, half = tl.arange(0, LANES)[:, None], tl.arange(0, HALF)[None, :]
    there = (heads < HEADS) & (half < HALF)
    if NORM:
        weight_a = tl.load(weight + half).to(tl.float32)
        weight_b = tl.load(weight + HALF + half).to(tl.float32)
    sum_a = tl.zeros((LANES, HALF), tl.float32)
    sum_b = tl.zeros((LANES, HALF), tl.float32)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        place = token * HEADS * 2 * HALF + heads * 2 * HALF + half
        d_a = tl.load(to_y + place, mask=there, other=0.0).to(tl.float32)
        d_b = tl.load(to_y + place + HALF, mask=there, other=0.0).to(tl.float32)
        if ROPE:
            angle = token // tokens * cos_stride + token % tokens * 2 * HALF + half
            cos_a, cos_b = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + HALF).to(tl.float32)
            sin_a, sin_b = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + HALF).to(tl.float32)
            d_a, d_b = d_a * cos_a + d_b * sin_b, d_b * cos_b - d_a * sin_a
        if NORM:
            a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            b = tl.load(x + place + HALF, mask=there, other=0.0).to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * HALF) + eps)
            a, b = a * scale, b * scale
            sum_a += d_a * a
            sum_b += d_b * b
            d_a, d_b = d_a * weight_a, d_b * weight_b
            along = tl.sum(d_a * a + d_b * b, axis=1, keep_dims=True) / (2 * HALF)
            d_a, d_b = (d_a - a * along) * scale, (d_b - b * along) * scale
        tl.store(to_x + place, d_a.to(to_x.dtype.element_ty), mask=there)
        tl.store(to_x + place + HALF, d_b.to(to_x.dtype.element_ty), mask=there)
    if NORM:
        row, lane = tl.program_id(0) * 2 * HALF, tl.arange(0, HALF)
        tl.store(to_weight + row + lane, tl.sum(sum_a, axis=0))
        tl.store(to_weight + row + HALF + lane, tl.sum(sum_b, axis=0))


@jit
def norm_forward(  # type: ignore[no-untyped-def]
    x, delta, weight, total, y, eps, WIDTH: tl.constexpr, LANES: tl.constexpr, ADD: tl.constexpr
):
    """One row: with ADD, `total` is x + delta, and that is what is normed."""
    lane = tl.arange(0, LANES)
    place, there = tl.program_id(0).to(tl.int64) * WIDTH + lane, lane < WIDTH
    a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if ADD:
        # Rounded as it is stored: backward reads it there.
        rounded = (a + tl.load(delta + place, mask=there, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=there)
        a = rounded.to(tl.float32)
    a = a / tl.sqrt(tl.sum(a * a) / WIDTH + eps) * tl.load(weight + lane, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, a.to(y.dtype.element_ty), mask=there)


@jit
def gate_forward(  # type: ignore[no-untyped-def]
    x, weight, z, y, eps, WIDTH: tl.constexpr, LANES: tl.constexpr, NORM: tl.constexpr
):
    """One row, normed and gated."""
    lane = tl.arange(0, LANES)
    place, there = tl.program_id(0).to(tl.int64) * WIDTH + lane, lane < WIDTH
    a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if NORM:
        a = a / tl.sqrt(tl.sum(a * a) / WIDTH + eps) * tl.load(weight + lane, mask=there, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(z + place, mask=there, other=0.0).to(tl.float32))
    tl.store(y + place, (a * opened).to(y.dtype.element_ty), mask=there)


@jit
def row_backward(  # type: ignore[no-untyped-def]
    x,
    weight,
    z,
    to_y,
    to_total,
    to_x,
    to_z,
    to_weight,
    count,
    eps,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Of `norm_forward` and `gate_forward`. Program i does rows i, i + programs, ... `to_weight` is [programs, W].

    With RESIDUAL, `to_total` is added to the gradient of x.
    """
    lane = tl.arange(0, LANES)
    there = lane < WIDTH
    if NORM:
        w = tl.load(weight + lane, mask=there, other=0.0).to(tl.float32)
    sum_w = tl.zeros((LANES,), tl.float32)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        place = tl.cast(index, tl.int64) * WIDTH + lane
        a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        d = tl.load(to_y + place, mask=there, other=0.0).to(tl.float32)
        if GATE:
            opened = tl.sigmoid(tl.load(z + place, mask=there, other=0.0).to(tl.float32))
        normed = a
        if NORM:
            scale = 1 / tl.sqrt(tl.sum(a * a) / WIDTH + eps)
            a = a * scale
            normed = a * w
        if GATE:
            tl.store(to_z + place, (d * normed * opened * (1 - opened)).to(to_z.dtype.element_ty), mask=there)
            d = d * opened
        if NORM:
            sum_w += d * a
            d = d * w
            d = (d - a * (tl.sum(d * a) / WIDTH)) * scale
        if RESIDUAL:
            d += tl.load(to_total + place, mask=there, other=0.0).to(tl.float32)
        tl.store(to_x + place, d.to(to_x.dtype.element_ty), mask=there)
    if NORM:
        tl.store(to_weight + tl.program_id(0) * WIDTH + lane, sum_w, mask=there)


@jit
def swiglu_forward(gate, up, y, size, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    g = tl.load(gate + place, mask=place < size, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(y + place, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=place < size)


@jit
def swiglu_backward(gate, up, to_y, to_gate, to_up, size, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    g = tl.load(gate + place, mask=place < size, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=place < size, other=0.0).to(tl.float32)
    d = tl.load(to_y + place, mask=place < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(to_gate + place, (d * u * s * (1 + g * (1 - s))).to(to_gate.dtype.element_ty), mask=place < size)
    tl.store(to_up + place, (d * g * s).to(to_up.dtype.element_ty), mask=place < size)


@jit
def scale(x, factor, size, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x *= factor, in place. A factor of one moves nothing."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
        value = tl.load(x + place, mask=place < size).to(tl.float32) * by
        tl.store(x + place, value.to(x.dtype.element_ty), mask=place < size)
