"""What ranks that share sequences exchange: a method of each mixer is replaced, from outside of the model.

A mixer says how it can be split (`hypenet.mixers.SplitBy`):

    attention   `Ulysses`        all-to-all: all tokens for a share of the heads, and back
    states      `ChunkStates`    all-gather of the state that each chunk leaves: its size does not grow with T
    heads       `HeadParallel`   all-to-all, as attention: these states cannot be added up afterwards

Shapes: B rows, T tokens of a row, S ranks of a group, C = T / S tokens of a chunk, H heads, K and V their widths.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo.parallel.sequence import Rows, SequenceGroup
from hypenet.implementations import like_flash, like_sdpa
from hypenet.linear_attention import by_token, linear_attention, without_autocast


class Ulysses:
    """Softmax attention over all tokens for a share of the heads (Jacobs et al., 2023), in place of a layer's `attend`.

    If there are more ranks than key and value heads, these are repeated (`repeats`).

    Raises:
        ValueError: the attention's implementation needs a mask to be causal.
    """

    def __init__(self, attention: Any, group: SequenceGroup):
        if not (like_sdpa(attention.implementation) or like_flash(attention.implementation)):
            raise ValueError(
                f"Ranks share sequences with sdpa or flash attention, not {attention.implementation}: load the model "
                "with one of them."
            )
        self._attend, self._group = attention.attend, group
        heads = attention.heads
        self._repeats = repeats(heads, heads // attention.num_key_value_groups, group.degree)
        attention.num_key_value_groups //= self._repeats

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, H, C, D], k and v [B, KV heads, C, D] -> [B, C, H, D], and no weights."""
        if attention_mask is not None:
            raise ValueError("Attention over a sequence that ranks share has no mask: leave padding out.")
        if self._repeats > 1:
            k, v = (x.repeat_interleave(self._repeats, dim=1) for x in (k, v))
        q, k, v = (self._group.exchange(x, cut=1, join=2) for x in (q, k, v))
        bounds = self._group.rows.bounds
        if bounds is not None:
            longest = int(bounds.diff().max())
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
        output, _ = self._attend(q, k, v, None, **kwargs)
        return self._group.exchange(output, cut=1, join=2), None


def repeats(heads: int, kv_heads: int, degree: int) -> int:
    """How often `Ulysses` repeats each key and value head, so that each rank has those of its query heads."""
    if kv_heads % degree == 0:
        return 1
    return degree // kv_heads if degree % kv_heads == 0 else heads // kv_heads


class ChunkStates:
    """Gated linear attention (hypenet/linear_attention.py) over chunks, in place of a mixer's `recurrence`.

    Let U_s be the state that chunk s alone leaves, and A_s the decay of an earlier state over the chunk. Each rank
    computes its own two, all are exchanged, and each rank begins with the state that the chunks before it leave:

        U_s = sum_t exp(G_C - G_t) k_t^T v_t        A_s = exp(G_C)        S_(s+1) = A_s S_s + U_s        S_0 = 0

    where G_t are the log-decays cumulated from the chunk's first token to t, and C is its last.
    """

    def __init__(self, mixer: nn.Module, group: SequenceGroup):
        self._group = group
        self._reach: int | None = None

    @without_autocast
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        scale: float,
        state: Tensor | None = None,
        keep_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """`linear_attention` over this rank's chunk, without a state of a cache."""
        _check_no_cache(state, keep_state)
        rows = self._group.rows
        weights, kept = self._kept(q, log_decay, rows)
        near = slice(-weights.shape[1], None)
        if rows.bounds is not None:
            row, continued, in_last, unbroken = rows.on(q.device)
            weights, kept = weights * in_last[:, near, None, None], kept * unbroken[:, None, None]
        keys, values = (rows.by_row(x)[:, near].to(weights.dtype) for x in (k, v))
        left = torch.einsum("bthk,bthv->bhkv", keys * weights, values)
        begun = _BegunWith.apply(left, kept.expand(left.shape[:3]), self._group)
        if rows.bounds is not None:
            begun = begun[row] * continued[:, None, None, None]
        output, _ = linear_attention(q, k, v, log_decay, scale=scale, state=begun, cu_seqlens=cu_seqlens)
        return output, None

    def _kept(self, q: Tensor, log_decay: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """exp(G_C - G_t), [B or 1, n, H, K or 1], of the last n tokens of a chunk, and exp(G_C), [B or 1, H, K or 1].

        n is C. With one fixed decay per head it is less: what earlier tokens leave has decayed to nothing in all heads.
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        if log_decay is None:
            return q.new_ones(1, rows.tokens, q.shape[2], 1, dtype=dtype), q.new_ones(1, q.shape[2], 1, dtype=dtype)
        if log_decay.ndim > 1:
            decay = by_token(log_decay, q).to(dtype)
            decay = rows.by_row(decay.expand(q.shape[0], *decay.shape[1:])).movedim(1, -1)  # a scan likes T last
            # From the end: the difference of two sums from the beginning would lose the last tokens' few digits.
            after = decay.flip(-1).cumsum(-1).flip(-1)
            return F.pad(after[..., 1:], (0, 1)).exp().movedim(-1, 1), after[..., 0].exp()
        if self._reach is None:
            slowest = min(-1e-9, float(log_decay.max()))  # once: the host waits for it
            self._reach = math.ceil(math.log(torch.finfo(dtype).tiny) / slowest)
        after = torch.arange(min(self._reach, rows.tokens), device=q.device, dtype=dtype).flip(0)
        log_decay = log_decay.to(dtype)
        return (after[:, None] * log_decay).exp()[None, ..., None], (rows.tokens * log_decay).exp()[None, :, None]


class _BegunWith(torch.autograd.Function):
    """U_s [B, H, K, V] and A_s [B, H, K] of this rank's chunk -> S_s.

    The gradient goes the other way: with D_s that of S_s, that of S_(s+1) = A_s S_s + U_s from all chunks after s is
    R_s = D_(s+1) + A_(s+1) R_(s+1), which is U_s's, and R_s S_s is A_s's.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, kept: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        exchanged = group.gather(torch.cat([left, kept[..., None]], dim=-1))  # one collective for both
        states, kept = exchanged.split([left.shape[-1], 1], dim=-1)
        begun = torch.zeros_like(left)
        for s in range(group.place):
            begun = kept[s] * begun + states[s]
        ctx.save_for_backward(kept.clone(), begun)  # not all that was gathered
        return begun

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, begun = ctx.saved_tensors
        group = ctx.group
        grads = group.gather(grad)
        to_left = torch.zeros_like(begun)
        for s in reversed(range(group.place + 1, group.degree)):
            to_left = grads[s] + kept[s] * to_left
        return to_left, (to_left * begun).sum(-1), None


class HeadParallel:
    """A mixer's `recurrence` over all tokens for a share of the heads, in its place."""

    def __init__(self, mixer: Any, group: SequenceGroup):
        self._recurrence: Callable[..., tuple[Tensor, Any]] = mixer.recurrence
        self._group = group

    def __call__(
        self,
        *inputs: Tensor | None,
        state: tuple[Tensor, ...] | None = None,
        keep_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The recurrence over this rank's chunk. `state`, if any, is the mixer's `first_state`."""
        _check_no_cache(None, keep_state)
        rows, group = self._group.rows, self._group

        def mine(x: Tensor, dim: int) -> Tensor:
            return x.chunk(group.degree, dim=dim)[group.place]

        def whole(x: Tensor | None) -> Tensor | None:
            """All tokens of this rank's heads. An input by head: the part of these heads."""
            if x is None or x.ndim < 3:
                return x if x is None else mine(x, 0)
            x = group.exchange(rows.by_row(x), cut=2, join=1)
            return x if rows.bounds is None else x.flatten(0, 1)[None]

        if state is not None:  # the same for all rows and documents
            count = rows.shape[0] if rows.bounds is None else len(rows.bounds) - 1
            state = tuple(mine(x, 1) if x.ndim > 1 else x for x in state)
            state = tuple(x[:1].expand(count, *x.shape[1:]) for x in state)
        output, _ = self._recurrence(*map(whole, inputs), state=state, cu_seqlens=rows.bounds, **options)
        given = inputs[0]
        assert given is not None
        output = group.exchange(output.view(rows.shape[0], -1, *output.shape[2:]), cut=1, join=2)
        return output.reshape(*given.shape[:2], *output.shape[2:]), None


def _check_no_cache(state: Any, keep_state: bool) -> None:
    if state is not None or keep_state:
        raise ValueError("A sequence that ranks share has no cache: pass use_cache=False.")


_REPLACED: dict[str, tuple[str, Callable[[Any, SequenceGroup], Any]]] = {
    "attention": ("attend", Ulysses),
    "states": ("recurrence", ChunkStates),
    "heads": ("recurrence", HeadParallel),
}
"""A mixer's `split` -> the method that is replaced, and the class that replaces it."""


def parallelize(mixers: Iterable[nn.Module], group: SequenceGroup) -> None:
    """Let mixers work on chunks of the group's rows. With a degree of 1 they stay as they are.

    Args:
        mixers: of HypeNet, or attention layers of a teacher after `halo.models.fuse.fuse`.

    Raises:
        ValueError: a mixer cannot be split, or is split already.
    """
    if group.degree == 1:
        return
    for mixer in mixers:
        if not can_be_split(mixer):
            raise ValueError(f"{type(mixer).__name__} cannot be split over the ranks of a sequence.")
        method, exchange = _REPLACED[mixer.split]  # type: ignore[index]
        if isinstance(getattr(mixer, method), (Ulysses, ChunkStates, HeadParallel)):
            raise ValueError(f"{type(mixer).__name__} is split over ranks already.")
        setattr(mixer, method, exchange(mixer, group))


def can_be_split(mixer: nn.Module) -> bool:
    """Whether ranks can share sequences of this mixer, or of this teacher's attention layer."""
    return getattr(mixer, "split", "no") in _REPLACED
