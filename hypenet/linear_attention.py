"""Gated linear attention: an outer-product state that decays (paper Eq. 5 and 6 with a diagonal F_t).

    S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t        o_t = scale q_t S_t

The log-decay g makes the mixer: none (linear attention), one per head (RetNet, Lightning), one per head and token
(Mamba2), or one per channel (GLA, HGRN-2).

Three forms of one function: `linear_attention_recurrence` reads as the equation and serves one-token decoding,
`linear_attention_chunked` is plain torch that trains on any device, and `linear_attention` picks the fastest.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values, N chunks of C tokens.
q, k are [B, T, H, K], v and the output [B, T, H, V], states [B, H, K, V]. `log_decay` is None, [H], [B, T, H] or
[B, T, H, K], never positive. States and decays are float32, or float64 where the input is.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from .fixed_decay import fixed_decay_attention, fixed_decay_serves
from .kernels import check_gated_backward, kernel, serves


def linear_attention_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: the reference, and the form that decodes one token.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = start(q, v, state)
    decay = by_token(log_decay, q).to(dtype).exp()
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t].to(dtype) for x in (q, k, v))
        state = decay[:, t, :, :, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1).to(q.dtype), state


def linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In chunks of C tokens: within a chunk as a masked matrix product, between chunks as a recurrence.

    Only differences G_i - G_j of cumulated log-decays with i >= j are exponentiated, which are never positive, so
    nothing overflows however strong the decay or long the sequence. With one per channel they are [C, C, K] a chunk,
    hence its small chunks.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    length, dim = q.shape[1], q.shape[-1]
    by_channel = log_decay is not None and log_decay.ndim == 4
    size = chunk_size(16 if by_channel else max(32, min(dim, 128)), length)  # C near K balances [C, C] and [K, V]
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = start(q, v, state)
    decay = by_token(log_decay, q).to(dtype)
    q_, k_, v_, g = (split_into_chunks(x.to(dtype), size) for x in (q, k, v, decay))  # [B, H, N, C, ...]

    total = g.cumsum(3)  # G, [B or 1, H, N, C, K or 1]
    steps = total[..., :, None, :] - total[..., None, :, :]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    within = steps.masked_fill(future[..., None], -torch.inf).exp()
    scores = by_channel_scores(q_, k_, within) if by_channel else q_ @ k_.mT * within[..., 0]
    across = total[:, :, :, -1, :, None].exp()
    updates = (k_ * (total[:, :, :, -1:] - total).exp()).mT @ v_  # [B, H, N, K, V]

    state, (states,) = over_chunks(lambda s, decay, new: (decay * s + new, (s,)), state, across, updates)
    output = scale * (scores @ v_ + (q_ * total.exp()) @ states)
    return join_chunks(output, length).to(q.dtype), state


def linear_attention(
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
    """By the fastest form: one step for one token; on a GPU in half precision a kernel, our own for a fixed decay and
    fla's for others; else chunks.

    Args:
        state: the state to continue; of documents, [documents, H, K, V].
        keep_state: whether to return the state after the last token.
        cu_seqlens: [documents + 1], where each of the documents packed in a batch of one begins, and the end.

    Returns:
        The output in q's dtype, and the state in the same shape, or None unless `keep_state`.

    Raises:
        RuntimeError: the installed triton cannot compute this.
    """
    final: Tensor | None
    one_step = q.shape[1] == 1 and cu_seqlens is None
    if not one_step and fixed_decay_serves(q, v, log_decay):
        return fixed_decay_attention(
            q, k, v, log_decay, scale=scale, state=state, keep_state=keep_state, cu_seqlens=cu_seqlens
        )
    if cu_seqlens is not None and not serves(q):
        return each_document(
            linear_attention, (q, k, v, log_decay), cu_seqlens, state=state, scale=scale, keep_state=keep_state
        )
    if one_step:
        output, final = linear_attention_recurrence(q, k, v, log_decay, scale=scale, state=state)
    elif serves(q):
        run, gate = _fla_kernel(q, v, log_decay)
        output, final = run(
            q,
            k,
            v,
            **gate,
            scale=scale,
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=beside(q, cu_seqlens),
        )
    else:
        output, final = linear_attention_chunked(q, k, v, log_decay, scale=scale, state=state)
    return output, final if keep_state else None


def _fla_kernel(q: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """fla's kernel for a log-decay, and the argument that carries it."""
    size = q.shape[-1] * v.shape[-1]
    if log_decay is not None and log_decay.ndim == 4:
        return kernel("gla.chunk_gla", state=size), {"g": log_decay}
    run = kernel("simple_gla.chunk_simple_gla", state=size)
    if log_decay is None:
        return run, {}
    if log_decay.ndim == 1:
        return run, {"g_gamma": log_decay}
    check_gated_backward(log_decay)
    return run, {"g": log_decay}


def each_document(
    recurrence: Callable[..., tuple[Tensor, Any]],
    inputs: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    *,
    state: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """A recurrence over packed documents without a kernel: one call for each.

    Args:
        inputs: [1, T, ...] if they are by token; those of fewer than three dimensions are the same for all.
        cu_seqlens: [documents + 1], where each begins, and the end.
        state: [documents, ...], one tensor or several, or None.

    Returns:
        The outputs in a row, and the states after each document, [documents, ...], or None where there are none.
    """
    outputs, states = [], []
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        document = (x[:, a:b] if x is not None and x.ndim > 2 else x for x in inputs)
        first = tree_map_only(Tensor, itemgetter(slice(i, i + 1)), state)
        output, last = recurrence(*document, state=first, **options)
        outputs.append(output)
        states.append(last)
    whole = None if states[0] is None else tree_map(lambda *parts: torch.cat(parts), *states)
    return torch.cat(outputs, dim=1), whole


_MOVED = WeakTensorKeyDictionary()


def beside(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """`cu_seqlens` on the device of `x`, where its kernel reads them. Moved once for all layers: fla caches by tensor
    what it derives from them, and to derive it the host waits."""
    if cu_seqlens is None or cu_seqlens.device == x.device:
        return cu_seqlens
    if cu_seqlens.is_inference():  # it does not tell whether it was written anew
        return cu_seqlens.to(x.device)
    version, moved = _MOVED.get(cu_seqlens, (-1, x))
    if version != cu_seqlens._version or moved.device != x.device:  # written anew, or for another device
        moved = cu_seqlens.to(x.device)
        _MOVED[cu_seqlens] = cu_seqlens._version, moved
    return moved


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast off: what is float32 there is so on purpose.

    Its first argument that is a tensor names the device.
    """

    @wraps(function)
    def run(*inputs: Any, **options: Any) -> Any:
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*inputs, **options)
        with torch.autocast(device, enabled=False):
            return function(*inputs, **options)

    return run


def widen(x: Tensor) -> Tensor:
    """x in the precision of gates and states: float32, or float64 if x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def start(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """`state`, or the state before the first token: zeros, [B, H, K, V], in float32 at least."""
    if state is not None:
        return state
    batch, _, heads, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros(batch, heads, dim, v.shape[-1], device=q.device, dtype=dtype)


def chunk_size(size: int, length: int) -> int:
    """`size`, but no more than there are tokens, if a recorded graph does not leave their number open."""
    return size if is_open(length) else min(size, length)


def is_open(length: Any) -> bool:
    """Whether a length is left open, in a graph that is recorded for any."""
    return not isinstance(length, int)


def over_chunks(
    step: Callable[..., tuple[Any, tuple[Tensor, ...]]], state: Any, *inputs: Tensor
) -> tuple[Any, tuple[Tensor, ...]]:
    """The recurrence between chunks: step(state, *inputs of a chunk) -> (the next state, outputs of the chunk).

    Args:
        state: one tensor or several, before the first chunk.
        inputs: [B, H, N, ...].

    Returns:
        The state after the last chunk, and the outputs, [B, H, N, ...].
    """
    chunks = inputs[0].shape[2]
    if is_open(chunks):  # a recorded graph for any number of chunks
        own = partial(torch.clone, memory_format=torch.contiguous_format)

        def recorded(state: Any, parts: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
            return tree_map(own, step(state, *parts))  # what it returns may not be what it was given

        state, stacked = scan(recorded, tree_map(own, state), tuple(x.movedim(2, 0) for x in inputs))
        return state, tuple(x.movedim(0, 2) for x in stacked)
    outputs = []
    for n in range(chunks):
        state, output = step(state, *(x[:, :, n] for x in inputs))
        outputs.append(output)
    return state, tuple(torch.stack(x, dim=2) for x in zip(*outputs, strict=True))


def split_into_chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...], the last chunk filled up with zeros: no key, no value, no decay."""
    chunks = (x.shape[1] + size - 1) // size + is_open(x.shape[1])  # one more: a graph for one would be for one alone
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, chunks * size - x.shape[1]))
    return in_chunks(x, size).movedim(3, 1).contiguous()


def by_channel_scores(rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """sum_k rows_ik weights_ijk columns_jk: [B, H, N, C, K] twice and [B or 1, H, N, C, C, K] -> [B, H, N, C, C]."""
    if is_open(rows.shape[2]):
        return (rows[..., :, None, :] * columns[..., None, :, :] * weights).sum(-1)
    return torch.einsum("bhnik,bhnjk,bhnijk->bhnij", rows, columns, weights)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[B, N * C, ...] -> [B, N, C, ...]."""
    if is_open(x.shape[1]):  # torch does not see that C divides N * C
        return x.unfold(1, size, size).movedim(-1, 2)
    return x.unflatten(1, (-1, size))


def join_chunks(x: Tensor, length: int) -> Tensor:
    """[B, H, N, C, ...] -> [B, T, H, ...] with T = `length`."""
    joined = x.movedim(1, 3).flatten(1, 2)
    if is_open(length):  # torch does not see that it is the shorter one
        return joined.index_select(1, torch.arange(length, device=x.device))
    return joined[:, :length]


def by_token(log_decay: Tensor | None, q: Tensor) -> Tensor:
    """Any form of the log-decay as [B or 1, T, H, K or 1]."""
    _, length, heads, _ = q.shape
    if log_decay is None:
        return q.new_zeros(1, length, heads, 1)
    if log_decay.ndim == 1:
        return log_decay.expand(1, length, heads)[..., None]
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]
