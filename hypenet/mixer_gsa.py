"""Gated slot attention (Zhang et al., 2024): softmax attention to M slots that forget (paper Table 10).

    g_t = logsigmoid(x_t W_f) / 8        s_t = 1 - exp(g_t)        one per head and slot
    K_t = K_(t-1) diag(exp(g_t)) + k_t^T s_t        the slots' keys
    V_t = diag(exp(g_t)) V_(t-1) + s_t^T v_t        the slots' values
    o_t = softmax(q_t K_t / sqrt(D)) V_t

Two linear attentions one after the other: the second decays along its keys, as GLA does, the first along its values.

Shapes: B batch, T tokens, H heads, K and V widths of keys and values, M slots, N chunks of C tokens.
q, k are [B, T, H, K], v and the output [B, T, H, V], `log_decay` g is [B, T, H, M] and never positive. The state is a
pair, the slots' keys [B, H, K, M] and values [B, H, M, V]. States and decays are float32, or float64 where the input
is.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import State
from .configuration_hypenet import HypeNetConfig
from .kernels import kernel, serves
from .linear_attention import (
    beside,
    chunk_size,
    each_document,
    is_open,
    join_chunks,
    linear_attention_chunked,
    over_chunks,
    split_into_chunks,
    start,
    widen,
)
from .mixers import mixer
from .rnn_mixer import RNNMixer, RNNOptions

Slots = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class GSAOptions(RNNOptions):
    """RNNOptions, and:

    Attributes:
        slots: M, slots per head.
        gate_logit_normalizer: what the log-decay is divided by.
    """

    slots: int = 64
    gate_logit_normalizer: float = 8


def gsa_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Slots | None = None
) -> tuple[Tensor, Slots]:
    """Token by token: the reference, and the form that decodes one token.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    s = -torch.expm1(log_decay)
    keys, values = _start(q, s, v, state)
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (widen(x[:, t]) for x in (q, k, v))
        decay, s_t = log_decay[:, t].exp(), s[:, t]
        keys = keys * decay[..., None, :] + k_t[..., :, None] * s_t[..., None, :]
        values = decay[..., :, None] * values + s_t[..., :, None] * v_t[..., None, :]
        p_t = (scale * torch.einsum("bhk,bhkm->bhm", q_t, keys)).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", p_t, values))
    return torch.stack(outputs, dim=1).to(q.dtype), (keys, values)


def gsa_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Slots | None = None
) -> tuple[Tensor, Slots]:
    """In chunks of C tokens, as `linear_attention_chunked`, in which the second of the two passes is made.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    s = -torch.expm1(log_decay)
    keys, values = _start(q, s, v, state)
    logits, keys = _slot_logits_chunked(q, k, s, log_decay, keys)
    p = (scale * logits).softmax(-1)
    output, values = linear_attention_chunked(p, s, v, log_decay, scale=1.0, state=values)
    return output.to(q.dtype), (keys, values)


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Slots | None = None,
    keep_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Slots | None]:
    """By the fastest form: one step for one token, fla's kernel for half precision on a GPU, else chunks.

    Args:
        state: the state to continue.
        keep_state: whether to return the state after the last token.
        cu_seqlens: [documents + 1], where each of the documents packed in a batch of one begins, and the end.

    Returns:
        The output in q's dtype, and the state, or None unless `keep_state`.
    """
    final: Slots
    if cu_seqlens is not None and not serves(q):
        return each_document(gsa, (q, k, v, log_decay), cu_seqlens, state=state, scale=scale, keep_state=keep_state)
    if q.shape[1] == 1 and cu_seqlens is None:
        output, final = gsa_recurrence(q, k, v, log_decay, scale=scale, state=state)
    elif serves(q):
        s = -torch.expm1(log_decay).to(k.dtype)
        output, final = kernel("gsa.chunk_gsa", state=s.shape[-1] * (q.shape[-1] + v.shape[-1]))(
            q,
            k,
            v,
            s,
            log_decay,
            scale=scale,
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=beside(q, cu_seqlens),
        )
    else:
        output, final = gsa_chunked(q, k, v, log_decay, scale=scale, state=state)
    return output, (final[0], final[1]) if keep_state else None


def _slot_logits_chunked(q: Tensor, k: Tensor, s: Tensor, log_decay: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """q_t K_t, [B, T, H, M], from the slots' keys before the first token, and those after the last.

    Only differences of cumulated log-decays that are never positive are exponentiated, [C, C, M] a chunk.
    """
    length = q.shape[1]
    size = chunk_size(16, length)
    q_, k_, s_, g = (split_into_chunks(widen(x), size) for x in (q, k, s, log_decay))  # [B, H, N, C, ...]

    total = g.cumsum(3)
    steps = total[..., :, None, :] - total[..., None, :, :]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    within = steps.masked_fill(future[..., None], -torch.inf).exp()
    across = total[:, :, :, -1, None, :].exp()
    updates = k_.mT @ (s_ * (total[:, :, :, -1:] - total).exp())  # [B, H, N, K, M]

    keys, (states,) = over_chunks(lambda s, decay, new: (s * decay + new, (s,)), keys, across, updates)
    if is_open(length):
        logits = ((q_ @ k_.mT)[..., None] * within * s_[..., None, :, :]).sum(-2)
    else:
        logits = torch.einsum("bhnij,bhnijm,bhnjm->bhnim", q_ @ k_.mT, within, s_)
    return join_chunks(logits + (q_ @ states) * total.exp(), length), keys


def _start(q: Tensor, s: Tensor, v: Tensor, state: Slots | None) -> Slots:
    """`state`, or the state before the first token."""
    return state or (start(q, s, None), start(s, v, None))


@mixer("gsa")
class GatedSlotAttention(RNNMixer):
    """GSA. `f_proj` is W_f."""

    Options = GSAOptions
    options: GSAOptions
    recurrence = staticmethod(gsa)
    split = "heads"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.f_proj = nn.Linear(config.hidden_size, self.heads * self.options.slots, bias=False)

    def multiply_adds(self, seq_len: int) -> float:
        """Two states, [D, M] and [M, D], are each written and read."""
        return 4 * self.head_dim * self.options.slots

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        decay = F.logsigmoid(widen(self.f_proj(hidden_states))) / self.options.gate_logit_normalizer
        return self.recurrence(q, k, v, decay.unflatten(-1, (self.heads, -1)), scale=self.scaling, **carried)
