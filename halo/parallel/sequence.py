"""Sequence parallelism: the ranks of a group hold one chunk each of the same sequences, in the order of their ranks.

What works token by token needs no exchange. What runs along the sequence is replaced, from outside of the model:

    softmax attention      `Ulysses`        all-to-all: all tokens for a share of the heads, and back
    outer-product states   `ChunkStates`    all-gather of the state that each chunk leaves: nothing grows with T
    other recurrences      `HeadParallel`   all-to-all, as attention: their state cannot be added up afterwards

Every rank of a group reads the whole rows of tokens, which are small, and takes its chunk: so positions are global, and
the label after a chunk's last token is at hand. docs/long-context.md has the traffic of each.

Shapes: B rows, T tokens of a row, S ranks of a group, C = T / S tokens of a chunk, H heads, K and V their widths.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halo.config import Config
from halo.distributed import rank
from halo.errors import UserError
from halo.models.fuse import window_of
from halo.models.loading import load_model_config, unpadded
from hypenet.linear_attention import by_token, linear_attention
from hypenet.mixers import build_mixer
from hypenet.rnn_mixer import RNNMixer
from hypenet.transfer import hybrid_config


class Rows:
    """Where the documents of the rows under way begin, as a rank sees it.

    Args:
        shape: B and T.
        bounds: [documents + 1] on the host: where each begins in the B x T tokens, and the end. None: a row is one.
        degree, place: S, and which chunk is this rank's.

    Attributes:
        bounds: as given, None where each row is one document.
        chunk_bounds: the same of the rank's B x C tokens, which cut what reaches beyond them; None as above.
        row: [documents of the chunk] the row that each is in.
        continued: [documents of the chunk] whether it began in an earlier chunk.
        in_last: [B, C] whether a token is in its row's last document.
        unbroken: [B] whether no document begins in the chunk.
    """

    def __init__(self, shape: tuple[int, int], bounds: Tensor | None, degree: int, place: int):
        self.shape, self.tokens = shape, shape[1] // degree
        self.first = place * self.tokens
        self.bounds = bounds
        self.chunk_bounds: Tensor | None = None
        self.row = self.continued = self.in_last = self.unbroken = torch.empty(0)
        self._moved: tuple[Tensor, ...] = ()
        if bounds is None:
            return
        begins = torch.zeros(shape, dtype=torch.bool)
        begins.view(-1)[bounds[:-1].long()] = True
        begins = self.of_chunk(begins)
        cuts = begins.clone()
        cuts[:, 0] = True
        self.row, column = cuts.nonzero(as_tuple=True)
        starts = self.row * self.tokens + column
        self.chunk_bounds = torch.cat([starts, starts.new_tensor([cuts.numel()])]).int()
        self.continued = ~begins[self.row, column]
        self.in_last = begins.cumsum(1) == begins.sum(1, keepdim=True)
        self.unbroken = ~begins.any(1)

    def of_chunk(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> this rank's [B, C, ...]."""
        return x[:, self.first : self.first + self.tokens]

    def positions(self) -> Tensor:
        """Of the chunk's tokens in their documents, [B or 1, C] int64 on the host."""
        tokens = torch.arange(self.shape[1])[None]
        if self.bounds is None:
            return self.of_chunk(tokens)
        starts = torch.zeros(self.shape, dtype=torch.long)
        begins = self.bounds[:-1].long()
        starts.view(-1)[begins] = begins % self.shape[1]
        return self.of_chunk(tokens - starts.cummax(1).values)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """`row`, `continued`, `in_last` and `unbroken` on a device: moved once, for all layers."""
        if not self._moved:
            self._moved = tuple(x.to(device) for x in (self.row, self.continued, self.in_last, self.unbroken))
        return self._moved

    def by_row(self, x: Tensor) -> Tensor:
        """[B, C, ...], or [1, B x C, ...] of packed documents -> [B, C, ...]."""
        return x.reshape(self.shape[0], self.tokens, *x.shape[2:])


class SequenceGroup:
    """The ranks that share sequences with this one: consecutive ones, so of one node where they fit in it.

    A model whose layers were given to `parallelize` runs on the rows that `begin` was last called with, in forward and
    in backward. Every rank must make every group, in the same order.

    Args:
        degree: S, which divides the number of ranks.
        apart: whether it has a communicator of its own, for what runs in another stream beside the first.
    """

    def __init__(self, degree: int = 1, *, apart: bool = False):
        self.degree, self.place = degree, rank() % degree
        self.group = _ranks(degree, apart) if degree > 1 else None
        self._rows: Rows | None = None

    @property
    def rows(self) -> Rows:
        assert self._rows is not None
        return self._rows

    def begin(self, input_ids: Tensor, bounds: Tensor | None = None) -> Rows:
        """Take up rows of [B, T] tokens, with packed documents where there are `bounds` (as `Rows` has them)."""
        self._rows = Rows(tuple(input_ids.shape), bounds, self.degree, self.place)  # type: ignore[arg-type]
        return self._rows

    def arguments(self, model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
        """Of a forward of this rank's chunk of the rows that were begun, [B, T], without a cache."""
        rows = self.rows
        arguments = unpadded(model, rows.of_chunk(input_ids))
        if self.degree > 1 or rows.bounds is not None:  # else the model counts by itself
            arguments["position_ids"] = rows.positions().to(input_ids.device, non_blocking=True)
        if rows.bounds is not None:
            arguments["cu_seq_lens_q"] = rows.chunk_bounds
        return arguments

    def all_of(self, flags: Tensor) -> Tensor:
        """[N] of this rank -> [N], true where it is so on every rank of the group."""
        flags = flags.int()
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.group)
        return flags.bool()

    def gather(self, x: Tensor) -> Tensor:
        """[...] -> [S, ...], every rank's."""
        gathered = x.new_empty(self.degree, *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        return gathered

    def exchange(self, x: Tensor, *, cut: int, join: int) -> Tensor:
        """Cut dimension `cut` into a share for each rank, and join theirs along dimension `join`. Differentiable."""
        return _Exchange.apply(x, self, cut, join)


@cache
def _ranks(degree: int, apart: bool) -> dist.ProcessGroup:
    """Made once: each communicator takes memory of the GPU."""
    group, _ = dist.new_subgroups(degree)
    return group


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        shares = torch.stack(x.chunk(group.degree, dim=cut))
        received = torch.empty_like(shares)
        dist.all_to_all_single(received, shares, group=group.group)
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(grad, ctx.group, ctx.join, ctx.cut), None, None, None


class Ulysses:
    """Softmax attention of all tokens by a share of the heads (Jacobs et al., 2023), in place of a layer's `attend`.

    Key and value heads that the ranks outnumber are repeated, each as often as it takes.
    """

    def __init__(self, attention: Any, group: SequenceGroup):
        self._attend, self._group = attention.attend, group
        heads = attention.config.num_attention_heads
        self._repeats = repeats(heads, heads // attention.num_key_value_groups, group.degree)
        attention.num_key_value_groups //= self._repeats

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, H, C, D], k and v [B, KV heads, C, D] -> [B, C, H, D], and no weights."""
        if attention_mask is not None:
            raise ValueError("Attention over a sequence that is split takes no mask: leave padding out.")
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
    """How often `Ulysses` repeats each key and value head, so that each rank has those of its queries."""
    if kv_heads % degree == 0:
        return 1
    return degree // kv_heads if degree % kv_heads == 0 else heads // kv_heads


class ChunkStates:
    """Gated linear attention (hypenet/linear_attention.py) over chunks, in the place of a mixer's `recurrence`.

    Let U_s be the state that chunk s leaves by itself, and A_s what its decays keep of an earlier one. Each rank makes
    its own, both are exchanged, and each rank begins with the state that the chunks before it leave:

        U_s = sum_t exp(G_C - G_t) k_t^T v_t        A_s = exp(G_C)        S_(s+1) = A_s S_s + U_s        S_0 = 0

    where G_t are the log-decays cumulated from the chunk's first token to t, and C is its last.
    """

    def __init__(self, group: SequenceGroup):
        self._group = group
        self._reach: int | None = None

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
        """As `linear_attention`, of this rank's chunk. A state is neither taken nor given."""
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

        What the tokens before them leave has decayed to nothing in every head, where one can know that beforehand:
        with one decay a head and nothing of the token.
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
    """A mixer's `recurrence` over all tokens by a share of the heads, in its place."""

    def __init__(self, recurrence: Callable[..., tuple[Tensor, Any]], group: SequenceGroup):
        self._recurrence, self._group = recurrence, group

    def __call__(
        self,
        *inputs: Tensor | None,
        state: tuple[Tensor, ...] | None = None,
        keep_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As the recurrence, of this rank's chunk. `state`, if any, is a first one that the mixer has learnt."""
        _check_no_cache(None, keep_state)
        rows, group = self._group.rows, self._group

        def mine(x: Tensor, dim: int) -> Tensor:
            return x.chunk(group.degree, dim=dim)[group.place]

        def whole(x: Tensor | None) -> Tensor | None:
            """All tokens of this rank's heads; of what is by head, this rank's."""
            if x is None or x.ndim < 3:
                return x if x is None else mine(x, 0)
            x = group.exchange(rows.by_row(x), cut=2, join=1)
            return x if rows.bounds is None else x.flatten(0, 1)[None]

        if state is not None:  # the same for all
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
        raise ValueError("A sequence that is split over ranks takes no cache: pass use_cache=False.")


def parallelize(mixers: Iterable[nn.Module], group: SequenceGroup) -> None:
    """Have mixers work on chunks of the group's rows, or of whole rows where its degree is 1.

    Args:
        mixers: of HypeNet, or attention layers of a teacher after `halo.models.fuse.fuse`.

    Raises:
        ValueError: a mixer cannot be split.
    """
    if group.degree == 1:
        return
    for mixer in mixers:
        if not can_be_split(mixer):
            raise ValueError(f"{type(mixer).__name__} cannot be split over the ranks of a sequence.")
        if isinstance(
            getattr(mixer, "recurrence", getattr(mixer, "attend", None)), (Ulysses, ChunkStates, HeadParallel)
        ):
            raise ValueError(f"{type(mixer).__name__} is split over ranks already.")
        if not isinstance(mixer, RNNMixer):
            if mixer.implementation != "sdpa":
                raise ValueError(
                    f"Ranks share sequences with sdpa, not {mixer.implementation}: load the model with it."
                )
            mixer.attend = Ulysses(mixer, group)  # type: ignore[assignment]
        elif mixer.recurrence is linear_attention:
            mixer.recurrence = ChunkStates(group)
        else:
            mixer.recurrence = HeadParallel(mixer.recurrence, group)


def can_be_split(mixer: nn.Module) -> bool:
    return hasattr(mixer, "recurrence") or hasattr(mixer, "attend")


def check_sequence_parallel(teacher: Path, config: Config, stage: str, ranks: int) -> None:
    """Whether the ranks can share the sequences of a stage as its settings say, found out without a weight.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    settings, shape = getattr(config, stage), load_model_config(teacher)
    degree, name = settings.sequence_parallel, f"{stage}.sequence_parallel"
    if degree == 1:
        return
    with torch.device("meta"):
        mixers = [
            build_mixer(hybrid_config(shape, kept, rnn_mixer=config.rnn_mixer, **config.architecture.switches()), 0)
            for kept in ([], [0])
        ]
        layers = AutoModelForCausalLM.from_config(shape).model.layers
    longest = max(settings.lengths) if stage == "niah" else settings.seq_len
    length = 0 if stage == "niah" else longest  # evaluation fills up what its ranks do not divide
    check_degree(name, degree, seq_len=length, ranks=ranks, mixers=mixers)
    rope = (getattr(shape, "rope_parameters", None) or getattr(shape, "rope_scaling", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise UserError(f"{name} = {degree}: RoPE of type {rope} depends on how long a rank's part is: set it to 1")
    windows = [window_of(layer.self_attn) for layer in layers] if stage not in ("finetune", "scaling") else []
    if any(window is not None and window < longest for window in windows):
        raise UserError(
            f"{name} = {degree}: the teacher has layers that see fewer tokens than a sequence of {longest}: set it to 1"
        )


def check_degree(name: str, degree: int, *, seq_len: int, ranks: int, mixers: Iterable[nn.Module]) -> None:
    """Whether `ranks` can share sequences of `seq_len` tokens so.

    Args:
        name: of the setting.
        mixers: one of each kind that occurs, on whatever device.

    Raises:
        UserError: saying what does not fit, and the nearest degrees that do.
    """
    if degree == 1:
        return
    sizes = {f"the {ranks} ranks": ranks, f"a sequence of {seq_len} tokens": seq_len}
    for mixer in mixers:
        if not can_be_split(mixer):
            raise UserError(f"{name} = {degree}: {type(mixer).__name__} cannot be split over ranks: set it to 1")
        if heads := shared_heads(mixer):
            sizes[f"the {heads} heads of {type(mixer).__name__}"] = heads
    for words, size in sizes.items():
        if size % degree:
            common = math.gcd(*sizes.values())
            fit = [d for d in range(1, common + 1) if common % d == 0]
            near = [max(d for d in fit if d < degree), *(d for d in fit if d > degree)][:2]
            raise UserError(f"{name} = {degree} does not divide {words}: use {' or '.join(map(str, near))}")


def shared_heads(mixer: Any) -> int | None:
    """The heads that the ranks of a group share among them, or None: the mixer exchanges states."""
    if isinstance(mixer, RNNMixer):
        return None if mixer.recurrence is linear_attention else mixer.heads
    return mixer.config.num_attention_heads
