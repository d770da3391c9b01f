"""Triton kernels of hypenet/fixed_decay.py.

A sequence is cut into segments, and a segment into chunks of C tokens. A program works on one segment of one head, and
on a block of the values' width; it walks over the chunks and keeps the state in registers.

    segment_states     the state that each segment leaves by itself
    scan_segments      from these the state before each segment, and after the last
    segment_outputs    the outputs from the states, and likewise every gradient

Backward runs the same kernels. The queries' gradient is a forward pass with other inputs. Those of keys and values are
passes in reverse, from the last token to the first: each kernel has a REVERSE. A pass reads a, b and c, which are q, k
and v in the forward pass.

Decays are applied without a [C, C] matrix of them: gamma^(i - j) = gamma^(i - m) gamma^(m - j), with m the middle of a
chunk. The second factor scales c, the first the output. None of these overflows or becomes zero if log(gamma) is at
least LEAST_LOG_DECAY (hypenet/fixed_decay.py).

Shapes: N tokens of all rows, H heads, D the width of a and b, E that of c; BD and BE are the powers of two that hold D
and a block of E. Inputs are [N, H, D] or [N, H, E], states [segments, H, D, E] in float32.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # nothing here is called then
    triton = None

from .fused_kernels import jit


@jit
def _segment(table, tokens, length, per_row, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token of this program's segment, and the one after its last."""
    segment = tl.program_id(0)
    if PACKED:
        return tl.load(table + 2 * segment), tl.load(table + 2 * segment + 1)
    row = segment // per_row
    begin = row * tokens + segment % per_row * length
    return begin, tl.minimum(begin + length, (row + 1) * tokens)


@jit
def segment_states(  # type: ignore[no-untyped-def]
    b,
    c,
    states,
    log_decay,
    table,
    tokens,
    length,
    per_row,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """sum_i gamma^(end - 1 - i) b_i^T c_i over a segment; in reverse, gamma^(i - begin + 1)."""
    begin, end = _segment(table, tokens, length, per_row, PACKED)
    head, block = tl.program_id(1) % H, tl.program_id(1) // H
    log_gamma = tl.load(log_decay + head)
    chunk, d, e = tl.arange(0, C), tl.arange(0, BD), block * BE + tl.arange(0, BE)
    # Tokens that are farther away leave less than float32 can hold beside the others: exp(-24) is 4e-11.
    reach = tl.minimum(-24.0 / tl.minimum(log_gamma, -1e-6), 1e9).to(tl.int32) // C * C + C
    first, last = begin, end
    if REVERSE:
        last = tl.minimum(end, begin + reach)
    else:
        first = tl.maximum(begin, begin + (end - begin - reach) // C * C)
    state = tl.zeros((BD, BE), tl.float32)
    for start in range(first, last, C):
        i = start + chunk
        there = i < end
        place = i.to(tl.int64)[:, None] * H + head
        b_i = tl.load(b + place * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        c_i = tl.load(c + place * E + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
        kept = tl.where(there, tl.exp(log_gamma * (i - begin + 1 if REVERSE else end - 1 - i)), 0.0)
        state = tl.dot(tl.trans((b_i * kept[:, None]).to(b_i.dtype)), c_i, state, input_precision="ieee")
    of_state = states + (tl.program_id(0).to(tl.int64) * H + head) * D * E
    tl.store(of_state + d[:, None] * E + e[None, :], state, mask=(d < D)[:, None] & (e < E)[None, :])


@jit
def scan_segments(  # type: ignore[no-untyped-def]
    states,
    given,
    left,
    log_decay,
    table,
    segments_before,
    tokens,
    length,
    per_row,
    factor,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Put the state before each segment of a document (in reverse: after it) in the place of the segment's own.

    Starts with `given` times `factor`, if it is GIVEN, and writes what comes after the last segment into `left`.
    """
    document, head = tl.program_id(0), tl.program_id(1)
    lane = tl.program_id(2) * LANES + tl.arange(0, LANES)
    there = lane < SIZE
    log_gamma = tl.load(log_decay + head)
    begin, end = document * per_row, (document + 1) * per_row
    if PACKED:
        begin, end = tl.load(segments_before + document), tl.load(segments_before + document + 1)
    of_document = (document.to(tl.int64) * H + head) * SIZE + lane
    state = tl.zeros((LANES,), tl.float32)
    if GIVEN:
        state += tl.load(given + of_document, mask=there, other=0.0) * factor
    step = -1 if REVERSE else 1
    segment = end - 1 if REVERSE else begin
    place = states + (segment.to(tl.int64) * H + head) * SIZE + lane
    own = tl.load(place, mask=there & (begin < end), other=0.0)  # a document may be empty
    for n in range(0, end - begin):
        following = tl.load(place + step * H * SIZE, mask=there & (n + 1 < end - begin), other=0.0)  # before it is due
        if PACKED:
            count = tl.load(table + 2 * segment + 1) - tl.load(table + 2 * segment)
        else:
            count = tl.minimum(length, tokens - segment % per_row * length)
        tl.store(place, state, mask=there)
        state = state * tl.exp(log_gamma * count) + own
        own = following
        segment += step
        place += step * H * SIZE
    if LEFT:
        tl.store(left + of_document, state, mask=there)


@jit
def segment_outputs(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    out,
    states,
    log_decay,
    table,
    tokens,
    length,
    per_row,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,
    STATES: tl.constexpr,
):
    """out_i = scale (sum_(j <= i) gamma^(i - j) (a_i b_j) c_j + gamma^(i - begin + 1) a_i S), S before the segment.

    In reverse: scale (sum_(j >= i) gamma^(j - i) (a_i b_j) c_j + gamma^(end - 1 - i) a_i S), S after the segment.

    TRANSPOSED: `states` hold [E, D]. Without STATES, S is zero.
    """
    begin, end = _segment(table, tokens, length, per_row, PACKED)
    head, block = tl.program_id(1) % H, tl.program_id(1) // H
    log_gamma = tl.load(log_decay + head)
    chunk, d, e = tl.arange(0, C), tl.arange(0, BD), block * BE + tl.arange(0, BE)
    middle = C // 2
    # Held so that gamma^n `state`, with n the tokens of a chunk, is what a_i reads and what the chunk's updates add to.
    state = tl.zeros((BD, BE), tl.float32)
    if STATES:
        of_state = states + (tl.program_id(0).to(tl.int64) * H + head) * D * E
        if TRANSPOSED:
            whole = (e < E)[:, None] & (d < D)[None, :]
            state = tl.trans(tl.load(of_state + e[:, None] * D + d[None, :], mask=whole, other=0.0))
        else:
            whole = (d < D)[:, None] & (e < E)[None, :]
            state = tl.load(of_state + d[:, None] * E + e[None, :], mask=whole, other=0.0)
        state = state * tl.exp(-log_gamma * (middle + 1 if REVERSE else C - 1 - middle))
    seen = chunk[None, :] >= chunk[:, None] if REVERSE else chunk[None, :] <= chunk[:, None]
    of_c = tl.exp((log_gamma if REVERSE else -log_gamma) * (chunk - middle))[:, None]
    of_out = scale * tl.exp((-log_gamma if REVERSE else log_gamma) * (chunk - middle))[:, None]
    chunks = tl.cdiv(end - begin, C)
    for n in range(0, chunks):
        start = begin + (chunks - 1 - n if REVERSE else n) * C
        i = start + chunk
        place = i.to(tl.int64)[:, None] * H + head
        rows, blocks = (i < end)[:, None] & (d < D)[None, :], (i < end)[:, None] & (e < E)[None, :]
        a_i = tl.load(a + place * D + d[None, :], mask=rows, other=0.0)
        b_i = tl.load(b + place * D + d[None, :], mask=rows, other=0.0)
        c_i = tl.load(c + place * E + e[None, :], mask=blocks, other=0.0)
        c_i = (c_i * of_c).to(c_i.dtype)
        state = state * tl.exp(log_gamma * (tl.minimum(end - start, C) if REVERSE else C))
        scores = tl.where(seen, tl.dot(a_i, tl.trans(b_i), input_precision="ieee"), 0.0).to(a_i.dtype)
        result = tl.dot(a_i, state.to(a_i.dtype), input_precision="ieee")
        result = tl.dot(scores, c_i, result, input_precision="ieee")
        state = tl.dot(tl.trans(b_i), c_i, state, input_precision="ieee")
        tl.store(out + place * E + e[None, :], (result * of_out).to(out.dtype.element_ty), mask=blocks)
