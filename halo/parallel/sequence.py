"""Sequence parallelism: the ranks of a group hold one chunk each of the same sequences, in the order of their ranks.

Every rank of a group reads the whole rows of tokens, which are small, and keeps its chunk: so positions are global, and
the label after a chunk's last token is at hand. Layers that work token by token need no exchange; the others get one
from halo/parallel/exchanges.py. docs/long-context.md has the traffic of each.

Shapes: B rows, T tokens of a row, S ranks of a group, C = T / S tokens of a chunk.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from halo.distributed import rank
from halo.models.loading import unpadded


class Rows:
    """Document boundaries of the batch, as this rank's chunk sees them.

    Args:
        shape: B and T.
        bounds: [documents + 1] on the host: where each begins in the B x T tokens, and the end. None: each row is one.
        degree, place: S, and the index of this rank's chunk.

    Attributes:
        bounds: as given, None if each row is one document.
        chunk_bounds: the same for the rank's B x C tokens, where the chunk's edges cut documents too; None as above.
        row: [documents of the chunk] the row of each.
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
        """The positions of the chunk's tokens in their documents, [B or 1, C] int64 on the host."""
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
    """The ranks that share sequences with this one: consecutive ones, so on one node if they fit there.

    A model whose layers were given to `parallelize` runs on the rows of the last call of `begin`, in forward and in
    backward. Every rank must make every group, in the same order.

    Args:
        degree: S, which divides the number of ranks.
        apart: whether it has its own communicator, for a model that runs in another stream.
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
        """Begin rows of [B, T] tokens, with packed documents if there are `bounds` (see `Rows`)."""
        self._rows = Rows(tuple(input_ids.shape), bounds, self.degree, self.place)  # type: ignore[arg-type]
        return self._rows

    def arguments(self, model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
        """The arguments of a forward of this rank's chunk of the current rows, [B, T], without a cache."""
        rows = self.rows
        arguments = unpadded(model, rows.of_chunk(input_ids))
        if self.degree > 1 or rows.bounds is not None:  # else the model counts by itself
            arguments["position_ids"] = rows.positions().to(input_ids.device, non_blocking=True)
        if rows.bounds is not None:
            arguments["cu_seq_lens_q"] = rows.chunk_bounds
        return arguments

    def all_of(self, flags: Tensor) -> Tensor:
        """[N] of this rank -> [N], true where it is true on every rank of the group."""
        flags = flags.int()
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.group)
        return flags.bool()

    def gather(self, x: Tensor) -> Tensor:
        """[...] -> [S, ...]: those of all ranks."""
        gathered = x.new_empty(self.degree, *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        return gathered

    def exchange(self, x: Tensor, *, cut: int, join: int) -> Tensor:
        """All-to-all: dimension `cut` is split over the ranks, their parts join along `join`. Differentiable."""
        return _Exchange.apply(x, self, cut, join)


@cache
def _ranks(degree: int, apart: bool) -> dist.ProcessGroup:
    """Made once: each communicator uses GPU memory."""
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
