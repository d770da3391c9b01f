"""What a long sequence leaves in memory for backward, and how to keep less of it.

    checkpointing   each decoder layer keeps its input alone, and is computed again in backward
    offload         those inputs wait in host memory
    tiles           an MLP, whose inside is three times as wide as a layer's input, computes `TILE` tokens at a time

All logits at once never exist: the loss applies the head in chunks (hypenet/losses.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

TILE = 16_384
"""Tokens that an MLP computes at a time. A row of stage 3, 16K, is one tile, and so needs no second forward."""


def checkpoint_activations(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Let a model's decoder layers keep only their input in training.

    Args:
        offload: whether the inputs wait in host memory.
    """
    # Reentrant: the other kind compares what backward recomputes with what ZeRO-3 had gathered in forward.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if offload:
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = _offloaded


def tile_mlps(model: PreTrainedModel) -> None:
    """Let the MLPs of a model's decoder layers compute TILE tokens at a time."""
    for layer in model.model.layers:
        layer.mlp.forward = partial(_in_tiles, layer.mlp, layer.mlp.forward)


def _offloaded(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint`, whose saved arguments go to host memory; within its forward nothing else is saved."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=True)


def _in_tiles(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A module's own `forward` of [B, T, D], tile by tile if there are more than TILE tokens."""
    if x.shape[:-1].numel() <= TILE:
        return forward(x)
    return _Tiles.apply(x, forward, *module.parameters())


class _Tiles(torch.autograd.Function):
    """Backward computes each tile again. A parameter's gradient comes once: ZeRO expects that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], *parameters: nn.Parameter) -> Tensor:
        # Not saved for backward: under ZeRO-3 a parameter has its values only while it is used.
        ctx.forward, ctx.parameters = forward, parameters
        ctx.save_for_backward(x)
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
