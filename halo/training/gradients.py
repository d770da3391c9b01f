"""Gradient norms by layer, and clipping, in place of DeepSpeed's own.

DeepSpeed converts each gradient to float64 for its norm, reads all gradients again to find what is not finite, and
multiplies all of them by the clipping factor: three more passes over memory, and ten kernels for each parameter. Here
one pass makes the norms, which also show what is not finite, and the optimizer's kernel applies the factor.

A layer's norm is that of the mean gradient over all ranks and micro-batches, in every ZeRO stage.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halo.distributed import device

_LAYER = re.compile(r"(?:^|\.)(?:layers|mixers)\.(\d+)\.")


def by_layer(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each layer, by its index; those outside of the layers, by their module's name."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found = _LAYER.search(name)
            layer = found.group(1) if found else name.split(".")[-2] if "." in name else name
            layers.setdefault(layer, []).append(parameter)
    return layers


class Gradients:
    """Measures and clips the gradients of a DeepSpeed optimizer: it replaces the optimizer's own methods.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3, around a fused AdamW.
        layers: as `by_layer` gives them; they are the optimizer's parameter groups.
        clip: the largest norm; 0 turns clipping off.
        apart: whether each layer is clipped by its own norm, not by the norm of all.
    """

    def __init__(self, zero: Any, layers: Mapping[str, list[nn.Parameter]], clip: float, *, apart: bool):
        self._zero, self._clip, self._apart = zero, clip, apart
        self._names = list(layers)
        self._index = {id(p): i for i, parameters in enumerate(layers.values()) for p in parameters}
        self._three = hasattr(zero, "fp16_groups")  # ZeRO-3
        self._offloaded = bool(zero.offload_optimizer if self._three else zero.cpu_offload)
        self._norms_layers: Tensor | None = None
        self._norms = torch.zeros(len(layers), device=device())
        self._read: list[float] | None = None
        """The norms on the host, once they were read."""
        self.factors: Tensor | None = None
        """What gradients are divided by, one number or one for each layer; None: by nothing."""
        # The norm shows what this check would find.
        zero.check_overflow = lambda *_, **__: None
        if self._three:
            zero._get_norm_groups = lambda: [self.measure()]
        else:
            zero.scaled_global_norm = self.measure
        zero.unscale_and_clip_grads = lambda *_: None
        self._plain_step, zero._optimizer_step = zero._optimizer_step, self._step

    def norms(self) -> dict[str, float]:
        """The last step's norms before clipping: `gradient_norm` of all, `gradient_norm/<layer>` of each layer."""
        if self._read is None:
            self._read = self._norms.tolist()
        norms = {f"gradient_norm/{name}": norm for name, norm in zip(self._names, self._read, strict=True)}
        return {"gradient_norm": math.hypot(*self._read)} | norms

    def measure(self) -> Tensor:
        """The global norm, a scalar on the device; not finite if a gradient is not."""
        squares = torch.zeros(len(self._names), device=device())
        for index, norms in self._shares():
            squares.index_add_(0, index, norms.to(squares).square())
        dist.all_reduce(squares, group=self._zero.dp_process_group)
        self._norms, self._read = squares.sqrt(), None
        total = squares.sum().sqrt()
        if self._clip:
            norms = self._norms if self._apart else total.expand(1)
            factors = ((norms + 1e-6) / self._clip).clamp(min=1.0)
            # An optimizer on the host reads them at once; torch would not wait for the GPU.
            self.factors = factors.cpu() if self._offloaded else factors
        return total

    def _shares(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of this rank's share of the gradients: their layers' indices and their norms, [n] both, in parts."""
        zero = self._zero
        groups = zero.fp16_groups if self._three else zero.params_in_partition
        if self._offloaded:  # DeepSpeed has measured them when they left the GPU
            for parameters in groups:
                norms = [(p, zero.norm_for_param_grads.get(zero.get_param_id(p))) for p in parameters]
                found = [(self._index[id(p)], float(norm)) for p, norm in norms if norm is not None]
                if found:
                    yield torch.tensor([i for i, _ in found], device=device()), torch.tensor([n for _, n in found])
            return
        index: list[int] = []
        measured: list[Tensor] = []
        for group, parameters in enumerate(groups):
            gradients = [g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
            for parameter, gradient in zip(parameters, gradients, strict=False):
                index.append(self._index[id(parameter)])
                measured.append(gradient)
        if not measured:
            return
        if self._norms_layers is None:  # once: the host waits for this copy to the GPU
            self._norms_layers = torch.tensor(index, dtype=torch.long, device=device())
        yield self._norms_layers, torch.stack(torch._foreach_norm(measured, 2, dtype=torch.float32))

    def factor_index(self, group: int) -> int:
        """The place in `factors` of a parameter group's (under ZeRO-3: of a part of one)."""
        return getattr(self._zero, "sub_group_to_group_id", {}).get(group, group) if self._apart else 0

    def _step(self, group: int) -> None:
        """The optimizer's step for one group."""
        if self.factors is not None:
            self._zero.optimizer.grad_scale = self.factors[self.factor_index(group)]
        self._plain_step(group)
