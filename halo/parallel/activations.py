"""What a long sequence leaves in memory for backward, and how to keep less of it.

    checkpointing   each decoder layer keeps its input, and what attention computed, and computes the rest again in
                    backward: attention takes longer to compute than all else, and is small to keep
    kept layers     as many layers as a GPU's memory holds keep everything, and compute nothing again
    offload         those inputs wait in host memory
    tiles           an MLP, whose inside is three times as wide as a layer's input, computes `TILE` tokens at a time

All logits at once never exist: the loss applies the head in chunks (hypenet/losses.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from halo.accelerator import on_gpu
from halo.distributed import device, say, world_size

MARGIN = 0.06
"""The share of a GPU's memory that kept layers leave free: torch's allocator cannot use every gap."""

TILE = 16_384
"""Tokens that an MLP computes at a time. A row of stage 3, 16K, is one tile, and so needs no second forward."""


def checkpoint_activations(model: PreTrainedModel, *, kept_layers: int = 0, offload: bool = False) -> "KeptLayers":
    """Let a model's decoder layers keep little more than their input in training.

    Args:
        kept_layers: as `KeptLayers` has it.
        offload: whether the inputs wait in host memory. Then attention is computed again, too.
    """
    # Reentrant: the other kind compares what backward recomputes with what ZeRO-3 had gathered in forward.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    kept = KeptLayers(model.model.layers, kept_layers)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = _offloaded if offload else partial(_checkpointed, kept.meter)
    return kept


def checkpointed_call(layer: nn.Module) -> Callable[..., Any]:
    """A function that runs a layer as it runs where it is checkpointed."""

    def run(hidden_states: Tensor, **kwargs: Any) -> Any:
        return _checkpointed(SavedBytes(), partial(layer, **kwargs), hidden_states)

    return run


class KeptLayers:
    """Which of a model's checkpointed layers keep everything for backward: the last `count`.

    They compute nothing again, so that a step takes less time, and its gradients are the same numbers.

    Args:
        layers: the model's decoder layers, all checkpointed.
        count: -1: as many as fit on the fullest GPU, found out in the first two steps (`adapt`). None on a CPU, and
            where inputs wait in host memory.
    """

    def __init__(self, layers: Iterable[Any], count: int):
        self._layers = list(layers)
        self._steps = 0
        self.meter = SavedBytes()
        self._choosing = self.meter.active = count == -1 and on_gpu()
        self._keep(max(count, 0))

    def _keep(self, count: int) -> None:
        self.count = min(count, len(self._layers))
        checkpointed = len(self._layers) - self.count
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i < checkpointed

    def adapt(self) -> None:
        """After a step. Every rank must call this.

        The second step has all that a step needs: the optimizer makes its state in the first.
        """
        self._steps += 1
        if not self._choosing or self._steps < 2:
            return
        self._choosing = self.meter.active = False
        free, total = torch.cuda.mem_get_info()
        room = free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated() - MARGIN * total
        fitting = torch.tensor(int(max(room, 0) // self.meter.most) if self.meter.most else 0, device=device())
        if world_size() > 1:
            dist.all_reduce(fitting, op=dist.ReduceOp.MIN)
        torch.cuda.empty_cache()  # what is cached has other sizes than what layers will keep
        self._keep(int(fitting))
        say(
            f"{self.count} of {len(self._layers)} layers keep their activations, {self.meter.most / 2**30:.1f} GiB "
            "each; the others compute them again"
        )


class SavedBytes:
    """Measures what a layer saves for backward where it is computed again, without its parameters.

    Attributes:
        active: whether it measures.
        most: the largest number of bytes of a layer.
    """

    def __init__(self) -> None:
        self.active, self.most = False, 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure what is saved within, if `active`."""
        if not self.active:
            yield
            return
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if not (x.is_leaf and x.requires_grad):
                storage = x.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            yield
        self.most = max(self.most, sum(found.values()))


def tile_mlps(model: PreTrainedModel) -> None:
    """Let the MLPs of a model's decoder layers compute TILE tokens at a time."""
    for layer in model.model.layers:
        layer.mlp.forward = partial(_in_tiles, layer.mlp, layer.mlp.forward)


def _checkpointed(meter: SavedBytes, function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint`, but attention's output is kept, and an MLP's, which nothing needs, is not computed again."""
    kept: deque[Any] = deque()
    runs = iter([_Keep(kept), _Recall(kept)])

    def run(*args: Any) -> Any:
        with next(runs), meter.measured():
            return function(*args)

    return checkpoint(run, *args, use_reentrant=True)


class _Keep(TorchDispatchMode):
    """Within, attention's outputs are kept, in order.

    torch's selective checkpointing would do it, but it wants to see the same operations twice: ZeRO-3's differ.
    """

    def __init__(self, kept: deque[Any]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        attention = _is_attention(func)
        if attention:  # in forward, without gradients, torch leaves out what backward needs
            names = [argument.name for argument in func._schema.arguments]
            args = tuple(name == "compute_log_sumexp" or x for name, x in zip(names, args, strict=False))
        output = func(*args, **(kwargs or {}))
        if attention:
            self._kept.append((func, output))
        return output


class _Recall(_Keep):
    """Within, where backward runs a layer again, attention gives what was kept, and `_Tiles` computes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not _is_attention(func):
            return func(*args, **(kwargs or {}))
        operation, output = self._kept.popleft()
        if operation is not func:  # torch may choose another one where a gradient is wanted
            return func(*args, **(kwargs or {}))
        # As new tensors: autograd notes at each what made it.
        return tree_map_only(Tensor, Tensor.detach, output)

    def __enter__(self) -> Any:
        _recomputing.append(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _recomputing.pop()
        super().__exit__(*error)


_recomputing: list[bool] = []
"""Not empty where backward runs a layer's forward again."""


def _is_attention(operation: Any) -> bool:
    """Whether it computes softmax attention: torch's and flash-attn's operations have it in their names."""
    name = operation.name()
    return ("attention" in name or "flash_attn" in name) and "backward" not in name


def _offloaded(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint`, whose saved arguments go to host memory; within its forward nothing else is saved."""
    with save_on_cpu(pin_memory=on_gpu()):
        return checkpoint(function, *args, use_reentrant=True)


def _in_tiles(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A module's own `forward` of [B, T, D], tile by tile if there are more than TILE tokens."""
    if x.shape[:-1].numel() <= TILE:
        return forward(x)
    return _Tiles.apply(x, forward, *module.parameters())


class _Tiles(torch.autograd.Function):
    """Backward computes each tile again. A parameter's gradient comes once: ZeRO expects that.

    An MLP is the last of its layer: where a checkpoint runs the layer again, nothing reads its output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], *parameters: nn.Parameter) -> Tensor:
        # Not saved for backward: under ZeRO-3 a parameter has its values only while it is used.
        ctx.forward, ctx.parameters = forward, parameters
        ctx.save_for_backward(x)
        if _recomputing:
            return torch.empty_like(x)
        return torch.cat([forward(tile) for tile in x.flatten(0, -2).split(TILE)]).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.parameters]
        tiles = (y.flatten(0, -2).split(TILE) for y in (x, grad, to_x))
        for tile, to_output, to_tile in zip(*tiles, strict=True):
            with torch.enable_grad():
                tile = tile.detach().requires_grad_()
                output = ctx.forward(tile)
            gradient, *gradients = torch.autograd.grad(output, (tile, *ctx.parameters), to_output)
            to_tile.copy_(gradient)
            for total, part in zip(sums, gradients, strict=True):
                total += part
        return to_x, None, *(total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True))
