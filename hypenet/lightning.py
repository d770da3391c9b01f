"""Lightning Attention: linear attention with one fixed decay a head (paper Eq. 18 and 19).

    S_t = gamma_h S_(t-1) + k_t^T v_t        o_t = scale q_t S_t

Three forms of one function: `lightning_recurrence` reads as the equation and serves one-token decoding,
`lightning_chunked` is plain torch that trains on any device, and `lightning_attention` picks the fastest.

Shapes: B batch, T tokens, H heads, D head dimension, N chunks of C tokens.
q, k, v and the output are [B, T, H, D], `log_decay` is [H], states are [B, H, D, D], keys by values.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)


def alibi_slopes(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slopes 2^(-8h/H), h = 1..H, of Eq. 19, as [H].

    Where H is no power of two: the slopes of the largest power of two below it, then every other slope of the
    next power, as ALiBi interpolates.
    """
    base = 2 ** (heads.bit_length() - 1)
    exponents = torch.arange(1, base + 1, device=device, dtype=dtype) * (8 / base)
    between = (2 * torch.arange(heads - base, device=device, dtype=dtype) + 1) * (4 / base)
    return torch.exp2(-torch.cat([exponents, between]))


def log_decay(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """log(gamma_h) of Eq. 19, as [H]: the negated slopes."""
    return -alibi_slopes(heads, device, dtype)


def lightning_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 18 token by token: the reference, and the way one token is decoded.

    Returns:
        The output in q's dtype, and the state after the last token in float32 (float64 where the input is).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    gamma = log_decay.to(dtype).exp()[:, None, None]
    state = _start(q, initial_state)
    outputs = []
    for q_t, k_t, v_t in zip(q.to(dtype).unbind(1), k.to(dtype).unbind(1), v.to(dtype).unbind(1), strict=True):
        state = gamma * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1).to(q.dtype), state


def lightning_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 18 in chunks of C tokens: within a chunk as a masked matrix product, between chunks as a recurrence.

    Every decay is a power of gamma that is zero or positive, so nothing overflows however long the sequence.

    Returns:
        The output in q's dtype, and the state after the last token in float32 (float64 where the input is).
    """
    batch, length, heads, dim = q.shape
    size = min(max(32, min(dim, 128)), length)  # C near D balances the products of [C, C] and [D, D]
    chunks = -(-length // size)
    dtype = torch.promote_types(q.dtype, torch.float32)

    def split(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, N, C, D], the last chunk filled up with zeros
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, chunks * size - length))
        return x.view(batch, chunks, size, heads, dim).permute(0, 3, 1, 2, 4).contiguous()

    q_, k_, v_ = split(q), split(k), split(v)

    step = torch.arange(size, device=q.device)
    tokens = torch.full((chunks, 1), size, device=q.device)  # in each chunk
    tokens[-1] = length - (chunks - 1) * size

    def decay(steps: Tensor) -> Tensor:  # gamma_h^steps, a head dimension in front
        return torch.exp(log_decay.to(dtype).view(-1, *[1] * steps.ndim) * steps)

    within = scale * decay((step[:, None] - step).clamp(min=0)).tril()  # [H, C, C]
    since_start = scale * decay(step + 1)  # [H, C]
    until_end = decay((tokens - 1 - step).clamp(min=0))  # [H, N, C]
    across = decay(tokens)  # [H, N, 1]

    updates = (k_ * until_end[..., None]).mT @ v_  # [B, H, N, D, D]
    state = _start(q, initial_state)
    states = []
    for n in range(chunks):
        states.append(state)
        state = across[:, n, :, None] * state + updates[:, :, n]

    inside = (q_ @ k_.mT * within[:, None]) @ v_
    outside = (q_ * since_start[:, None, :, None]) @ torch.stack(states, dim=2)
    output = (inside + outside).permute(0, 2, 3, 1, 4).reshape(batch, chunks * size, heads, dim)
    return output[:, :length].to(q.dtype), state


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Eq. 18 by the fastest form: one step for one token, fla's kernel for half precision on a GPU, else chunks.

    Returns:
        The output in q's dtype, and the final state in float32, or None where it was not asked for.
    """
    kernel = _fla_kernel() if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else None
    state: Tensor | None
    if q.shape[1] == 1:
        output, state = lightning_recurrence(q, k, v, log_decay, scale=scale, initial_state=initial_state)
    elif kernel is not None:
        output, state = kernel(
            q,
            k,
            v,
            g_gamma=log_decay,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
    else:
        output, state = lightning_chunked(q, k, v, log_decay, scale=scale, initial_state=initial_state)
    return output, state if output_final_state else None


def _start(q: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    batch, _, heads, dim = q.shape
    return torch.zeros(batch, heads, dim, dim, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))


@cache
def _fla_kernel() -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """fla's chunk_simple_gla, or None with a warning where it cannot be imported.

    Imported by name: transformers takes every import statement in exported model code for a hard requirement.
    """
    try:
        return importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except ImportError as error:
        logger.warning("Lightning Attention runs in plain torch, many times slower, without fla-core: %s", error)
        return None
