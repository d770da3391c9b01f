"""What a module costs on a GPU, measured without one: it runs on the meta device, where tensors have no data.

Torch dispatches every operation of forward and backward as it would on a GPU. `DryRun` sees them: what each allocates,
when that is freed, and how much work it is. A fused kernel of a GPU (attention, and the recurrences of
flash-linear-attention) is replaced by a stand-in that saves and allocates what the kernel does.

    with DryRun() as run:
        output = module(x)             # parameters and x on the meta device, made before
    run.live, run.peak, run.work       # bytes held now, bytes held at most, and what was computed
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from halo.losses import squared_error
from hypenet import fused, kernels, losses

CHUNK = 64
"""Tokens of a chunk in flash-linear-attention's kernels: they keep a state for each chunk while they run."""
RECURRENCE_PASSES = 18
"""A recurrence's forward takes as long as moving its queries this many times through memory, its backward twice that.

From stage 2 of 1.7B on an H200: 0.35 ms a layer for 6,144 tokens and 16 heads of 128 (measured).
"""

_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}

OperationKind = Literal["product", "attention", "kernel", "other"]
"""A matrix product; flash attention; a fused kernel; one of torch's elementwise operations, norms and reductions."""


@dataclass(frozen=True)
class Operation:
    """One kernel's work."""

    kind: OperationKind
    flops: float
    moved: int
    """Bytes read and written."""


@dataclass
class Work:
    """What was computed, in order."""

    operations: list[Operation] = field(default_factory=list)
    dispatched: int = 0
    """How many operations the host issued, views and allocations among them."""

    def shared(self, ranks: int) -> "Work":
        """One rank's share: the same number of operations, each on a part."""
        parts = [Operation(op.kind, op.flops / ranks, op.moved // ranks) for op in self.operations]
        return Work(parts, self.dispatched)


class DryRun(TorchDispatchMode):
    """Counts the memory and the work of what torch runs inside. Tensors that were made before are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.work = Work()
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._replaced = ExitStack()

    def __enter__(self) -> "DryRun":
        self._replaced.enter_context(_replaced_kernels(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._replaced.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs, outputs = _tensors_in((args, kwargs)), _tensors_in(output)
        known = {id(x.untyped_storage()) for x in inputs}
        for tensor in outputs:
            if id(tensor.untyped_storage()) not in known:
                self._hold(tensor.untyped_storage())
        self.work.dispatched += 1
        packet = func._overloadpacket
        if not func.is_view and packet.__name__ not in _NO_KERNEL:
            flops = flop_registry[packet](*args, **kwargs, out_val=output) if packet in flop_registry else 0
            attention = "attention" in packet.__name__
            kind: OperationKind = "other"
            if flops:
                kind = "attention" if attention else "product"
            # The registry counts every pair of tokens; half of them are in the future.
            self.work.operations.append(Operation(kind, flops / 2 if attention else flops, _bytes(inputs + outputs)))
        return output

    def record(self, kind: OperationKind, *moved: Tensor) -> None:
        """Record an operation that reads or writes these tensors."""
        self.work.operations.append(Operation(kind, 0, _bytes(moved)))

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def release(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes that a kernel moves to read or write `tensors`; an expanded one is read once."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of training a module. Bytes are without its parameters, their gradients and its input."""

    kept: int
    """Bytes that forward leaves for backward."""
    peak: int
    """Bytes at the highest point of forward and backward, `kept` included."""
    forward: Work
    backward: Work


def cost_of(module: nn.Module, run: Callable[[], Tensor]) -> Cost:
    """The cost of forward and backward of `run`, which calls `module` (on the meta device) and returns its output.

    Gradients of parameters are dropped at once, as ZeRO does.
    """
    handles = [p.register_post_accumulate_grad_hook(_drop) for p in module.parameters()]
    with DryRun() as dry:
        output = run()
        kept = dry.live - output.untyped_storage().nbytes()
        forward, dry.work = dry.work, Work()
        edge, grad = get_gradient_edge(output), torch.empty_like(output)
        del output
        torch.autograd.backward((edge,), (grad,))
    for handle in handles:
        handle.remove()
    return Cost(kept=kept, peak=dry.peak, forward=forward, backward=dry.work)


def frozen_cost_of(run: Callable[[], Tensor]) -> tuple[int, Work]:
    """(bytes at the highest point, work) of `run` without gradients."""
    with torch.no_grad(), DryRun() as dry:
        run()
    return dry.peak, dry.work


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _replaced_kernels(run: DryRun) -> Iterator[None]:
    """Have meta tensors take the path of a GPU's (docs/design.md lists what is replaced)."""

    def recurrence(operation: str, state: int, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _Recurrence.apply(run, state, *_tensors_in((args, kwargs))), None

    def squares(*inputs: Tensor) -> tuple[Tensor, ...]:
        run.record("kernel", *inputs)
        return torch.empty(2, device="meta").unbind()

    def program(_kernel: Any, _programs: int, *inputs: Any, **_shape: Any) -> None:
        run.record("kernel", *_tensors_in(inputs))

    places: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", _attention),
        *((module, "fused_kernel_serves", lambda x: x.is_meta) for module in (fused, losses)),
        *((module, "run_program", program) for module in (fused, losses)),
        (squared_error, "_squared_error_plain", squares),
        (losses, "exact_logits", lambda x, head, out=None: torch.mm(x, head.T, out_dtype=torch.float32, out=out)),
        (torch, "is_autocast_enabled", lambda *device: False),  # the meta device has none, and asking is an error
    ]
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        with kernels.stand_in(recurrence):
            yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's, by the kernel of a GPU: flash attention, or with a mask the memory-efficient one."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)[0]


class _Recurrence(torch.autograd.Function):
    """A kernel of flash-linear-attention: it keeps its inputs, and while it runs a state for each chunk of tokens."""

    @staticmethod
    def forward(ctx: Any, run: DryRun, state: int, *inputs: Tensor) -> Tensor:
        ctx.run, ctx.state = run, state
        ctx.save_for_backward(*inputs)
        states = _states(inputs[0], state, torch.bfloat16)
        run.record("kernel", *[inputs[0]] * RECURRENCE_PASSES)
        del states
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        states = [_states(inputs[0], ctx.state, torch.float32) for _ in range(2)]  # and their gradients
        ctx.run.record("kernel", *[inputs[0]] * 2 * RECURRENCE_PASSES)
        gradients = [torch.empty_like(x) for x in inputs]
        del states
        return None, None, *gradients


def _states(q: Tensor, state: int, dtype: torch.dtype) -> Tensor:
    """A state of `state` numbers for each head and chunk of q, [B, T, H, D]."""
    batch, tokens, heads, _ = q.shape
    return q.new_empty(batch, -(-tokens // CHUNK), heads, state, dtype=dtype)
