"""Linear attention with one fixed decay a head (Lightning, RetNet, or none) on this project's own kernels.

    S_t = gamma_h S_(t-1) + k_t^T v_t        o_t = scale q_t S_t        gamma_h = exp(log_decay_h)

What hypenet.linear_attention computes for such decays, without fla: forward, backward, states in and out, packed
documents. How the work is cut follows from its shape alone; nothing is tuned at run time.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .fixed_decay_kernels import scan_segments, segment_outputs, segment_states
from .kernels import has_triton

CHUNK_TOKENS = 64
"""Tokens of a chunk: one tile of the GPU's matrix unit."""
LEAST_LOG_DECAY = -1.25
"""The strongest decay: gamma^CHUNK_TOKENS must not be zero in float32. The slopes of Eq. 19 are below 1."""
SHORTEST, LONGEST = 256, 2048
"""Tokens of a segment."""
ENOUGH_PROGRAMS = 512
"""This many fill a GPU: about four for each multiprocessor of an H100."""
STATE_LANES = 1024
"""Elements of a state that one program of the scan processes."""

_IN_RANGE = WeakTensorKeyDictionary()


def fixed_decay_serves(q: Tensor, v: Tensor, log_decay: Tensor | None) -> bool:
    """Whether these kernels compute the tensors: bfloat16 on a GPU, Triton installed, heads that registers hold, decays
    that are one per head, constant, and not too strong.

    Not float16, which cannot hold the scaled values.
    """
    if log_decay is not None and (log_decay.ndim != 1 or log_decay.requires_grad):
        return False
    return _kernels_take(q, v) and (log_decay is None or _in_range(log_decay))


def _in_range(log_decay: Tensor) -> bool:
    """Whether no decay is stronger than LEAST_LOG_DECAY. Found out once for a tensor: the host waits for it."""
    if torch.compiler.is_compiling():
        torch._assert_async((log_decay >= LEAST_LOG_DECAY).all(), f"A log-decay is below {LEAST_LOG_DECAY}.")
        return True
    if log_decay not in _IN_RANGE:
        _IN_RANGE[log_decay] = float(log_decay.min()) >= LEAST_LOG_DECAY
    return _IN_RANGE[log_decay]


def _kernels_take(q: Tensor, v: Tensor) -> bool:
    return q.is_cuda and q.dtype == torch.bfloat16 and has_triton() and q.shape[-1] <= 256 and v.shape[-1] <= 256


@torch.compiler.disable
def fixed_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor | None = None,
    keep_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """
    Args:
        q, k: [B, T, H, K] bfloat16.
        v: [B, T, H, V] bfloat16.
        log_decay: [H], from LEAST_LOG_DECAY to 0, without gradient; None: no decay.
        state: [B, H, K, V] float32 to continue, of documents [documents, H, K, V]; None: zeros.
        keep_state: whether to return the state after the last token.
        cu_seqlens: [documents + 1], where each of the documents packed in a batch of one begins, and the end.

    Returns:
        The output [B, T, H, V] bfloat16, and the state, or None where it was not asked for.
    """
    if log_decay is None:
        log_decay = torch.zeros(q.shape[2], device=q.device)
    segments = _packed(cu_seqlens, q, v) if cu_seqlens is not None else _of_rows(q, v)
    output, left = _FixedDecay.apply(q, k, v, log_decay.float().contiguous(), state, scale, keep_state, segments)
    return output, left if keep_state else None


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """How the tokens of a call are cut.

    Attributes:
        count: segments of all documents. Without packed documents, each row is one.
        documents: how many there are.
        tokens: T; 0 where documents are packed.
        length: tokens of a segment, but for a document's last.
        per_row: segments of a row; 0 where documents are packed.
        table: [count, 2] int32, begin and end of each segment where documents are packed.
        before: [documents + 1] int32, how many segments stand before each document.
    """

    count: int
    documents: int
    tokens: int
    length: int
    per_row: int
    table: Tensor | None = None
    before: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.table is not None

    @property
    def cut(self) -> tuple[Tensor | None, int, int, int]:
        """What a kernel finds its segment from."""
        return self.table, self.tokens, self.length, self.per_row

    @property
    def one_each(self) -> bool:
        """Whether each row is one segment, so that no state passes from one to another."""
        return self.per_row == 1


def _of_rows(q: Tensor, v: Tensor) -> _Segments:
    batch, tokens = q.shape[:2]
    length = _length(batch * tokens, q, v)
    if tokens <= 2 * length:
        length = tokens
    per_row = -(-tokens // length)
    return _Segments(count=batch * per_row, documents=batch, tokens=tokens, length=length, per_row=per_row)


_TABLES = WeakTensorKeyDictionary()


def _packed(cu_seqlens: Tensor, q: Tensor, v: Tensor) -> _Segments:
    """Made once for all layers: from the tensor of bounds that they are given."""
    length = _length(q.shape[1], q, v)
    if cu_seqlens.is_inference():  # it does not tell whether it was written anew
        return _of_documents(cu_seqlens, length, q.device)
    key = (cu_seqlens._version, q.device, length)
    made, segments = _TABLES.get(cu_seqlens, (None, None))
    if made != key:
        segments = _of_documents(cu_seqlens, length, q.device)
        _TABLES[cu_seqlens] = key, segments
    assert segments is not None
    return segments


def _of_documents(cu_seqlens: Tensor, length: int, device: torch.device) -> _Segments:
    bounds = cu_seqlens.cpu().long()
    counts = -(-bounds.diff() // length)
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    document = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    begin = bounds[document] + (torch.arange(len(document), device="cpu") - before[document]) * length
    end = torch.minimum(begin + length, bounds[document + 1])
    return _Segments(
        count=len(document),
        documents=len(counts),
        tokens=0,
        length=length,
        per_row=0,
        table=torch.stack([begin, end], dim=1).int().to(device),
        before=before.int().to(device),
    )


def _length(tokens: int, q: Tensor, v: Tensor) -> int:
    """Tokens of a segment: a power of two, for ENOUGH_PROGRAMS programs where there are as many tokens."""
    programs = tokens * q.shape[2] * _blocks(v.shape[-1]) // ENOUGH_PROGRAMS
    return max(SHORTEST, min(LONGEST, 1 << max(0, programs.bit_length() - 1)))


def _tile(width: int) -> int:
    """The power of two that holds a width; a tile has 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def _block(width: int) -> int:
    """The part of the values' width that one program processes."""
    return 32 if width > 128 else min(64, _tile(width))


def _blocks(width: int) -> int:
    return -(-width // _block(width))


def _shape(heads: int, d: int, e: int) -> dict[str, int]:
    """The constants of a kernel that walks over chunks."""
    return {"H": heads, "D": d, "E": e, "BD": _tile(d), "BE": _block(e), "C": CHUNK_TOKENS}


class _FixedDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        scale: float,
        keep_state: bool,
        segments: _Segments,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        states = left = None
        if state is not None or keep_state or not segments.one_each:
            states, left = _states_between(k, v, log_decay, segments, given=state, keep=keep_state)
        ctx.scale, ctx.segments, ctx.given = scale, segments, state is not None
        ctx.save_for_backward(q, k, v, log_decay, states)
        return _outputs(q, k, v, states, log_decay, segments, scale), left

    @staticmethod
    def backward(ctx: Any, to_output: Tensor, to_left: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, states = ctx.saved_tensors
        scale, segments = ctx.scale, ctx.segments
        to_output = to_output.contiguous()
        # The gradients of the states, over `scale`: the pass in reverse multiplies by it, as the one forward does.
        grads = to_given = None
        if ctx.given or to_left is not None or not segments.one_each:
            grads, to_given = _states_between(
                q, to_output, log_decay, segments, given=to_left, factor=1 / scale, keep=ctx.given, reverse=True
            )
        to_q = _outputs(to_output, v, k, states, log_decay, segments, scale, transposed=True)
        to_k = _outputs(v, to_output, q, grads, log_decay, segments, scale, reverse=True, transposed=True)
        to_v = _outputs(k, q, to_output, grads, log_decay, segments, scale, reverse=True)
        return to_q, to_k, to_v, None, None if to_given is None else to_given * scale, None, None, None


def _states_between(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    segments: _Segments,
    *,
    given: Tensor | None,
    factor: float = 1.0,
    keep: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The state before each segment (in reverse: after it); with `keep`, also those after each document."""
    heads, d, e = *b.shape[2:], c.shape[-1]
    states = b.new_empty(segments.count, heads, d, e, dtype=torch.float32)
    left = b.new_empty(segments.documents, heads, d, e, dtype=torch.float32) if keep else None
    with torch.cuda.device_of(b):
        segment_states[(segments.count, heads * _blocks(e))](
            *(b, c, states, log_decay, *segments.cut),
            **_shape(heads, d, e),
            REVERSE=reverse,
            PACKED=segments.packed,
            num_warps=4,
            num_stages=3,
        )
        scan_segments[(segments.documents, heads, -(-d * e // STATE_LANES))](
            *(states, None if given is None else given.float().contiguous(), left, log_decay),
            *(segments.table, segments.before, segments.tokens, segments.length, segments.per_row, factor),
            H=heads,
            SIZE=d * e,
            LANES=STATE_LANES,
            REVERSE=reverse,
            PACKED=segments.packed,
            GIVEN=given is not None,
            LEFT=keep,
            num_warps=4,
        )
    return states, left


def _outputs(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor | None,
    log_decay: Tensor,
    segments: _Segments,
    scale: float,
    *,
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`segment_outputs` in c's shape."""
    heads, d, e = *a.shape[2:], c.shape[-1]
    out = torch.empty_like(c)
    with torch.cuda.device_of(a):
        segment_outputs[(segments.count, heads * _blocks(e))](
            *(a, b, c, out, states, log_decay, *segments.cut, scale),
            **_shape(heads, d, e),
            REVERSE=reverse,
            TRANSPOSED=transposed,
            PACKED=segments.packed,
            STATES=states is not None,
            num_warps=4,
            num_stages=2,
        )
    return out
