"""The delta rule and its kin: a state that can also forget along one direction (paper Eq. 5 and 6, App. G).

    S_t = diag(exp(g_t)) S_(t-1) + b_t^T (a_t S_(t-1)) + k_t^T v_t        o_t = scale q_t S_t

F_t is diagonal plus rank one: a_t S_(t-1) is what the state holds along a_t, and b_t is where that goes. Its cases:

    DeltaNet, GDN, KDA   S_t = (I - beta_t k_t^T k_t) diag(exp(g_t)) S_(t-1) + beta_t k_t^T v_t     `delta_rule`
    RWKV-7               a_t = -kappa_t, b_t = kappa_t * rate_t                                     `rwkv7`

Three forms as in linear_attention.py: `delta_rule_recurrence` reads as the equation and serves one-token decoding,
`delta_rule_chunked` is plain torch that trains on any device, and the two functions named above pick the fastest.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values, N chunks of C tokens.
q, k, a, b are [B, T, H, K], v and the output [B, T, H, V], beta [B, T, H], states [B, H, K, V]. `log_decay` is None,
[B, T, H] or [B, T, H, K], never positive. States and decays are float32, or float64 where the input is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import check_gated_backward, kernel, serves
from .linear_attention import (
    beside,
    by_channel_scores,
    by_token,
    chunk_size,
    each_document,
    join_chunks,
    over_chunks,
    split_into_chunks,
    start,
    widen,
)

RWKV7_STRONGEST_DECAY = -math.exp(-0.5)
"""No log-decay of RWKV-7 is below it."""


def delta_rule_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token: the reference, and the form that decodes one token.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    state = start(q, v, state)
    decay = widen(by_token(log_decay, q)).exp()
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, a_t, b_t = (widen(x[:, t]) for x in (q, k, v, a, b))
        held = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = (
            decay[:, t, :, :, None] * state
            + b_t[..., :, None] * held[..., None, :]
            + k_t[..., :, None] * v_t[..., None, :]
        )
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1).to(q.dtype), state


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In chunks of C tokens: within a chunk one triangular system, between chunks a recurrence.

    Let u_i = a_i S_(i-1), G the log-decays cumulated from the beginning of a chunk, and S its state there. Then

        S_i = exp(G_i) S + sum_(j <= i) exp(G_i - G_j) (k_j^T v_j + b_j^T u_j)

    so that each u_i is linear in S and in the u_j before it: a unit lower triangular system, which is solved for all
    chunks at once (the WY form of Yang et al., 2025). Only G_i - G_j with i >= j are exponentiated, which are never
    positive, so nothing overflows however strong the decay. With one per channel they are [C, C, K] a chunk, hence its
    small chunks.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    length = q.shape[1]
    size = chunk_size(16 if log_decay is not None and log_decay.ndim == 4 else 64, length)
    state = start(q, v, state)
    inputs = (q, k, v, a, b, by_token(log_decay, q))
    q_, k_, v_, a_, b_, g = (split_into_chunks(widen(x), size) for x in inputs)  # [B, H, N, C, ...]

    total = g.cumsum(3)  # G, [B or 1, H, N, C, K or 1]
    total_before = F.pad(total, (0, 0, 1, -1))  # G_(i-1)
    steps = total[..., :, None, :] - total[..., None, :, :]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    within = steps.masked_fill(future[..., None], -torch.inf).exp()  # exp(G_i - G_j), [B or 1, H, N, C, C, K or 1]
    before = F.pad(within, (0, 0, 0, 0, 1, -1))  # exp(G_(i-1) - G_j)
    until_end = (total[:, :, :, -1:] - total).exp()
    across = total[:, :, :, -1, :, None].exp()

    known = torch.cat([_scores(a_, k_, before) @ v_, a_ * total_before.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(-_scores(a_, b_, before), known, upper=False, unitriangular=True)
    held_of_chunk, reads = solved.split([v.shape[-1], q.shape[-1]], dim=-1)  # u = held_of_chunk + reads S
    written = (k_ * until_end).mT @ v_  # [B, H, N, K, V]
    returned = (b_ * until_end).mT  # [B, H, N, K, C]

    def step(state: Tensor, *chunk: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        held_of_chunk, reads, across, returned, written = chunk
        held = held_of_chunk + reads @ state
        return across * state + returned @ held + written, (state, held)

    state, (states, held) = over_chunks(step, state, held_of_chunk, reads, across, returned, written)
    output = (q_ * total.exp()) @ states
    output = output + _scores(q_, k_, within) @ v_ + _scores(q_, b_, within) @ held
    return join_chunks(scale * output, length).to(q.dtype), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor | None = None,
    keep_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet without a decay, GDN with one per head, KDA with one per channel, by the fastest form.

    That is one step for one token, fla's kernel for half precision on a GPU, else chunks.

    Args:
        beta: [B, T, H], from 0 to 2 for keys of length one.
        state: the state to continue.
        keep_state: whether to return the state after the last token.
        cu_seqlens: [documents + 1], where each of the documents packed in a batch of one begins, and the end.

    Returns:
        The output in q's dtype, and the state, or None unless `keep_state`.

    Raises:
        RuntimeError: the installed triton cannot compute this.
    """
    if cu_seqlens is not None and not serves(q):
        inputs = (q, k, v, beta, log_decay)
        return each_document(delta_rule, inputs, cu_seqlens, state=state, scale=scale, keep_state=keep_state)
    if not _kernel_serves(q, cu_seqlens):
        write = widen(beta)[..., None] * k
        read = k if log_decay is None else by_token(log_decay, q).exp() * k
        return _without_kernel(q, write, v, read, -write, log_decay, scale=scale, state=state, keep_state=keep_state)
    gate = {} if log_decay is None else {"g": log_decay}
    if log_decay is None:
        operation = "delta_rule.chunk_delta_rule"
    elif log_decay.ndim == 3:
        check_gated_backward(log_decay)
        operation = "gated_delta_rule.chunk_gated_delta_rule"
    else:
        operation = "kda.chunk_kda"
    run = kernel(operation, state=q.shape[-1] * v.shape[-1])
    carried = {"initial_state": state, "output_final_state": keep_state, "cu_seqlens": beside(q, cu_seqlens)}
    return run(q, k, v, beta=beta.to(q.dtype), **gate, scale=scale, **carried)


def rwkv7(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    keep_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The general form with RWKV-7's decay, one per channel, by the fastest form.

    Args:
        log_decay: [B, T, H, K], from `RWKV7_STRONGEST_DECAY` to 0: with stronger ones the kernel would overflow.
        state, keep_state, cu_seqlens: as in `delta_rule`.

    Returns:
        As `delta_rule`.
    """
    if cu_seqlens is not None and not serves(q):
        inputs = (q, k, v, a, b, log_decay)
        return each_document(rwkv7, inputs, cu_seqlens, state=state, scale=scale, keep_state=keep_state)
    if not _kernel_serves(q, cu_seqlens):
        return _without_kernel(q, k, v, a, b, log_decay, scale=scale, state=state, keep_state=keep_state)
    run = kernel("rwkv7.chunk_rwkv7", state=q.shape[-1] * v.shape[-1])
    carried = {"initial_state": state, "output_final_state": keep_state, "cu_seqlens": beside(q, cu_seqlens)}
    return run(r=q, w=log_decay, k=k, v=v, a=a, b=b, scale=scale, lower_bound=RWKV7_STRONGEST_DECAY, **carried)


def _scores(rows: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
    """sum_k rows_ik decay_ijk columns_jk: [.., C, K], [.., C, K] and [.., C, C, K or 1] -> [B, H, N, C, C]."""
    if decay.shape[-1] == 1:
        return rows @ columns.mT * decay[..., 0]
    return by_channel_scores(rows, columns, decay)


def _kernel_serves(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    return serves(q) and (q.shape[1] > 1 or cu_seqlens is not None)


def _without_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    state: Tensor | None,
    keep_state: bool,
) -> tuple[Tensor, Tensor | None]:
    form = delta_rule_recurrence if q.shape[1] == 1 else delta_rule_chunked
    output, final = form(q, k, v, a, b, log_decay, scale=scale, state=state)
    return output, final if keep_state else None
