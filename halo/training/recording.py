"""Forward and backward of a micro-batch as one CUDA graph, which the host launches in one call.

Some two thousand kernels make a step, and each costs the host up to 0.1 ms. Where kernels take less, in small models
and in stage 1, the GPU would wait for the host. The first two micro-batches run kernel by kernel: the first compiles
and tunes, the second shows whether the host must wait for the GPU amid the work, which no graph can. The third is
recorded.

The gradients lie in the graph's memory. They are given away as they are, so a graph costs no memory beside.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halo.accelerator import on_gpu
from halo.distributed import world_size
from halo.teacher.batch import Batch
from hypenet.kernels import plain_only

SMALL = 1e9
"""Bytes of gradients: up to so many, their reduction over ranks and their memory matter less than the host's time."""


class Minimised:
    """An objective's forward as the engine runs it: what it minimises, the loss, and the values to log.

    What is minimised is the loss over the number of micro-batches of a step, not finite if the loss is not: then no
    gradient is, and every rank sees it in the gradient norm.

    Args:
        objective: its forward gives the mean loss of a micro-batch and values to log, scalars. All its parameters are
            trained.
        accumulation: micro-batches of a step.
        recordable: whether the forward may be recorded where the GPU shows that it can be.
    """

    def __init__(self, objective: nn.Module, accumulation: int, *, recordable: bool):
        self._forward, self._accumulation = objective.forward, accumulation
        self._named = dict(objective.named_parameters())
        self._aliased = _Aliased(objective, self._forward)
        self._recordable = recordable and on_gpu() and not plain_only()
        self._calls = 0
        self._recorded: _StepGraph | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self._calls += 1
        if not self._recordable or self._calls == 1:
            return self._minimised(batch, self._forward)
        if self._calls == 2:
            with _WaitsOfHost() as waits:
                made = self._hand_out(*self._made(batch, self._forward, list(self._named.values())))
            self._recordable = not waits.found
            return made
        if self._recorded is None or not self._recorded.serves(batch):
            self._recorded = None  # its memory is free before the next takes its own
            self._recorded = _StepGraph(self._made_with_aliases, list(self._named.values()), batch)
        return self._hand_out(*self._recorded(batch))

    def _minimised(self, batch: Batch, forward: Callable[..., Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Kernel by kernel: backward makes the gradients."""
        loss, values = forward(batch)
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        return loss * finite / self._accumulation, loss.detach(), values

    def _made(
        self, batch: Batch, forward: Callable[..., Any], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[str], Tensor, tuple[Tensor | None, ...]]:
        """The same with the gradients of `parameters`.

        Returns:
            What is minimised; the names of the values, and these behind the loss, [1 + values]; the gradients.
        """
        minimised, loss, values = self._minimised(batch, forward)
        gradients = torch.autograd.grad(minimised, parameters, allow_unused=True)
        return minimised.detach(), list(values), torch.stack([loss, *values.values()]), gradients

    def _made_with_aliases(self, batch: Batch) -> Any:
        """The same with new tensors in the parameters' memory. Autograd ties a parameter to the stream that used it
        first, which is not the one that is recorded."""
        aliases = {name: p.detach().requires_grad_() for name, p in self._named.items()}
        return self._made(batch, self._aliased.forward_of(aliases), list(aliases.values()))

    def _hand_out(
        self, minimised: Tensor, names: list[str], numbers: Tensor, gradients: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, *values = numbers.clone().unbind()
        return (
            _HandOut.apply(minimised, gradients, self._accumulation > 1, *self._named.values()),
            loss,
            dict(zip(names, values, strict=True)),
        )


class _Aliased(nn.Module):
    """Calls the objective's own forward with other tensors as its parameters."""

    def __init__(self, objective: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.objective, self.forward = objective, forward

    def forward_of(self, parameters: dict[str, Tensor]) -> Callable[..., Any]:
        named = {f"objective.{name}": tensor for name, tensor in parameters.items()}
        return lambda batch: functional_call(self, named, (batch,))


def worth_recording(parameters: Sequence[nn.Parameter], accumulation: int, *, late: bool) -> bool:
    """Whether a record of forward and backward is better than what it hinders: a reduction of gradients that is hidden
    behind the backward, and micro-batches whose gradients are summed where they are made.

    Args:
        accumulation: micro-batches of a step.
        late: whether backward gives away all gradients at its end anyway.
    """
    small = sum(p.numel() * p.element_size() for p in parameters) <= SMALL
    return late or small or (world_size() == 1 and accumulation == 1)


class _StepGraph:
    """A graph for batches of the same shapes."""

    def __init__(self, make: Callable[[Batch], Any], parameters: Sequence[nn.Parameter], batch: Batch):
        self._parameters, self._places = parameters, _places(parameters)
        self._batch = _with_tensors(batch, [x.clone() for x in _tensors(batch)])
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: NCCL's watchdog thread may make CUDA calls meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = make(self._batch)

    def serves(self, batch: Batch) -> bool:
        """Whether the batch has the shapes that were recorded, and the weights lie where they did."""
        same = [x.shape for x in _tensors(batch)] == [x.shape for x in _tensors(self._batch)]
        return same and self._places == _places(self._parameters)

    def __call__(self, batch: Batch) -> Any:
        for static, given in zip(_tensors(self._batch), _tensors(batch), strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._made


class _HandOut(torch.autograd.Function):
    """A scalar with gradients of `parameters` that exist already, and that belong to it whatever follows: the engine
    minimises it as it is."""

    @staticmethod
    def forward(
        ctx: Any, minimised: Tensor, gradients: tuple[Tensor | None, ...], summed: bool, *parameters: nn.Parameter
    ) -> Tensor:
        """Args:
        summed: whether those of several micro-batches are summed.
        """
        ctx.gradients, ctx.summed, ctx.parameters = gradients, summed, parameters
        return minimised.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, None, *map(partial(_given, summed=ctx.summed), ctx.parameters, gradients)


def _given(parameter: nn.Parameter, gradient: Tensor | None, *, summed: bool) -> Tensor | None:
    """A parameter without a gradient takes one that nobody else holds as it is: here a new tensor of the same memory.

    But not if more will be added to it: the graph writes into that memory again.
    """
    if gradient is None:
        return None
    return gradient.clone() if summed and parameter.grad is None else gradient.detach()


class _WaitsOfHost:
    """Within, sees whether the host waits for the GPU: `found`, afterwards."""

    def __enter__(self) -> "_WaitsOfHost":
        self._before = torch.cuda.get_sync_debug_mode()
        self._caught = warnings.catch_warnings(record=True)
        self._warnings = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode(self._before)
        self._caught.__exit__(*error)
        self.found = any("synchronizing CUDA operation" in str(warning.message) for warning in self._warnings)


def _places(parameters: Sequence[nn.Parameter]) -> list[int]:
    return [p.data_ptr() for p in parameters]


def _tensors(batch: Batch) -> list[Tensor]:
    """What a micro-batch has on the GPU."""
    logits = batch.teacher_logits
    return [batch.input_ids, batch.labels, *(() if logits is None else logits.parts)]


def _with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with these in place of its `_tensors`."""
    ids, labels, *parts = tensors
    logits = batch.teacher_logits
    return replace(
        batch, input_ids=ids, labels=labels, teacher_logits=None if logits is None else logits.with_parts(parts)
    )
