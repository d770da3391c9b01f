"""What flash-attn's packages compute, in a few lines of torch: their functions, for machines without their kernels."""

from itertools import pairwise

import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> Tensor:
    """q [B, T, H, D], k and v [B, S, KV heads, D] -> [B, T, H, D]. Queries and keys fit at their ends."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    back = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    back = back - torch.arange(k.shape[1], device=q.device)
    hidden = back < 0 if causal else torch.zeros_like(back, dtype=torch.bool)
    if window_size[0] is not None:
        hidden |= back > window_size[0]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: object,
) -> tuple[Tensor, None]:
    """q [tokens, H, D], k and v [tokens, KV heads, D]: each sequence alone. Returned as the fourth version does."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max())) == (max_seqlen_q, max_seqlen_k)
    of_q, of_k = (list(pairwise(bounds.tolist())) for bounds in (cu_seqlens_q, cu_seqlens_k))
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0]  # type: ignore[arg-type]
        for (a, b), (c, d) in zip(of_q, of_k, strict=True)
    ]
    return torch.cat(parts), None
