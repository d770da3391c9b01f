"""The operations between a layer's matrix products, each as one kernel on a GPU and as plain torch elsewhere.

    normed(x, delta, w)   RMSNorm(x + delta) w, and x + delta: the residual stream (Eq. 15 and 16)
    projections(x, ...)   x W of several W: their gradients of x are one sum
    turn(x, w, rope)      RoPE(RMSNorm(x) w), head by head: queries and keys (Eq. 12 and 18)
    gated(x, w, z)        RMSNorm(x) w * sigmoid(z): the output gate (Eq. 14 and 17)
    swiglu(g, u)          silu(g) u: the MLP
    scale_(x, factor)     x factor, in place

A kernel rounds once, while torch rounds after each operation; it keeps only its inputs for backward.
`fused_kernel_serves` is the switch: where it is false, all of this is plain torch.

Shapes: B batch, T tokens, H heads, D their width, W any width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from .fused_kernels import (
    gate_forward,
    norm_forward,
    row_backward,
    scale,
    swiglu_backward,
    swiglu_forward,
    turn_backward,
    turn_forward,
)
from .kernels import has_triton

Rope = tuple[Tensor, Tensor]
"""RoPE's cos and sin, [B or 1, T, D] each."""

REDUCTION_PROGRAMS = 1056
"""Programs of a kernel that sums over rows: eight for each multiprocessor of an H100."""
LANES = 2048
"""Elements per program of an elementwise kernel."""
LARGE = 2**24
"""A tensor with more elements takes longer to move than to launch a kernel."""
WIDEST = 16_384
"""The widest row that one program holds."""


def fused_kernel_serves(x: Tensor) -> bool:
    """Whether this file's kernels compute `x`: half precision on a GPU, Triton installed."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and has_triton()


def normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., W] -> (RMSNorm(x + delta) times `weight` [W], x + delta). Without a `delta`, the latter is x.

    Use what is returned in place of x from there on: then backward adds the two gradients of x in the norm's kernel.
    """
    if fused_kernel_serves(x) and x.shape[-1] <= WIDEST:
        return _Normed.apply(x, delta, weight, eps)
    total = x if delta is None else x + delta
    # Under autocast the weight has another precision, which torch's kernel does not take.
    return F.rms_norm(total, weight.shape, weight.to(total.dtype), eps), total


def projections(x: Tensor, *layers: nn.Module | None) -> tuple[Any, ...]:
    """The output of each layer for x, [..., W]; None for a layer that is None.

    Backward adds the gradients of x inside of the products, if layers are plain linear ones.
    """
    together = [layer for layer in layers if layer is not None and _is_plain(layer, x.dtype) and _has_gradient(x)]
    outputs = iter(_Projections.apply(x, *(layer.weight for layer in together)) if together else ())
    return tuple(None if layer is None else next(outputs) if layer in together else layer(x) for layer in layers)


def _has_gradient(x: Tensor) -> bool:
    """Whether x has a gradient, and products of it are of its own precision."""
    wanted = x.requires_grad and torch.is_grad_enabled() and fused_kernel_serves(x)
    return wanted and not torch.is_autocast_enabled(x.device.type)


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a call of the layer is x W and nothing else: no bias, no adapter, no hook, no forward of its own."""
    if (
        type(layer) is not nn.Linear
        or dict(layer.named_parameters()).keys() != {"weight"}
        or layer.weight.dtype != dtype
    ):
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return "forward" not in vars(layer) and not any(hooks)


def turn(x: Tensor, weight: Tensor | None, eps: float, rope: Rope | None) -> Tensor:
    """[B, T, H, D] -> the same, normed if there is a `weight` [D], and turned if there is a `rope`."""
    half = x.shape[-1] // 2
    if fused_kernel_serves(x) and half & (half - 1) == 0 and (weight is not None or rope is not None):
        return _Turn.apply(x, weight, eps, *(rope or (None, None)))
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if rope is not None:
        x, _ = apply_rotary_pos_emb(x, x[:, :, :0], *rope, unsqueeze_dim=2)
    return x


def gated(x: Tensor, weight: Tensor | None, eps: float, gate: Tensor) -> Tensor:
    """[..., W], normed if there is a `weight` [W], times the sigmoid of `gate`, [..., W]."""
    if fused_kernel_serves(x) and x.shape[-1] <= WIDEST:
        return _Gated.apply(x, weight, eps, gate)
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return x * torch.sigmoid(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., W]."""
    return _SwiGLU.apply(gate, up) if fused_kernel_serves(gate) else F.silu(gate) * up


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, a scalar on x's device, in place. A large x is not read if the factor is one, as a loss's gradient
    mostly is; nor is a small one where a launch costs the host nothing, because it is recorded."""
    if not (fused_kernel_serves(x) and x.is_contiguous() and (x.numel() >= LARGE or _records())):
        return x.mul_(factor)
    run_program(scale, -(-x.numel() // LANES), x, factor, x.numel(), LANES=LANES)
    return x


def _records() -> bool:
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # as where a plan stands in for a GPU
        return False
    return torch.cuda.is_current_stream_capturing()


@torch.compiler.disable
def run_program(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Run one of hypenet/fused_kernels.py on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=warps)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        delta = None if delta is None else delta.contiguous()
        y, total = torch.empty_like(x), x if delta is None else torch.empty_like(x)
        width = x.shape[-1]
        ctx.shape, ctx.eps, ctx.adds = {"WIDTH": width, "LANES": _power_of_two(width)}, eps, delta is not None
        run_program(
            norm_forward, x.numel() // width, x, delta, weight, total, y, eps, warps=8, **ctx.shape, ADD=ctx.adds
        )
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, to_y: Tensor | None, to_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if to_y is None:
            return to_total, to_total if ctx.adds else None, None, None
        to_x, to_weight, _ = _row_gradients(x, weight, None, to_y, to_total, ctx.eps, **ctx.shape)
        return to_x, to_x if ctx.adds else None, to_weight, None


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(x @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, flat = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        to_x = flat[0] @ weights[0]
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            to_x.addmm_(grad, weight)
        needed = ctx.needs_input_grad[1:]
        return to_x.view_as(x), *(grad.T @ rows if need else None for grad, need in zip(flat, needed, strict=True))


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        if cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        ctx.shape = _turn_shape(x, weight, cos)
        batch, tokens = x.shape[:2]
        run_program(
            turn_forward,
            batch * tokens,
            *(x, weight, cos, sin, y, tokens, _batch_stride(cos), eps),
            **ctx.shape,
        )
        ctx.eps = eps
        ctx.save_for_backward(x, weight, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        to_y, to_x = to_y.contiguous(), torch.empty_like(x)
        batch, tokens = x.shape[:2]
        programs = min(batch * tokens, REDUCTION_PROGRAMS)
        partial = None if weight is None else weight.new_empty(programs, x.shape[-1], dtype=torch.float32)
        run_program(
            turn_backward,
            programs,
            *(x, weight, cos, sin, to_y, to_x, partial, batch * tokens, tokens, _batch_stride(cos), ctx.eps),
            **ctx.shape,
        )
        return to_x, _summed(partial, weight), None, None, None


def _turn_shape(x: Tensor, weight: Tensor | None, cos: Tensor | None) -> dict[str, Any]:
    heads, width = x.shape[2:]
    return {
        "HEADS": heads,
        "LANES": _power_of_two(heads),
        "HALF": width // 2,
        "NORM": weight is not None,
        "ROPE": cos is not None,
    }


def _batch_stride(cos: Tensor | None) -> int:
    return 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor) -> Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        ctx.shape, norms = {"WIDTH": width, "LANES": _power_of_two(width)}, weight is not None
        run_program(gate_forward, x.numel() // width, x, weight, gate, y, eps, warps=8, **ctx.shape, NORM=norms)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, gate)
        return y

    @staticmethod
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        to_x, to_weight, to_gate = _row_gradients(x, weight, gate, to_y, None, ctx.eps, **ctx.shape)
        return to_x, to_weight, None, to_gate


def _row_gradients(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    to_y: Tensor,
    to_total: Tensor | None,
    eps: float,
    **shape: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and gate, from those of y and of the residual stream: rows of `_Normed` or `_Gated`.

    Args:
        x: [..., W], contiguous; `gate` too.
        shape: the kernel's WIDTH and LANES.
    """
    to_x, to_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
    to_total = None if to_total is None else to_total.contiguous()
    rows = x.numel() // x.shape[-1]
    programs = min(rows, REDUCTION_PROGRAMS)
    partial = None if weight is None else weight.new_empty(programs, x.shape[-1], dtype=torch.float32)
    run_program(
        row_backward,
        programs,
        *(x, weight, gate, to_y.contiguous(), to_total, to_x, to_gate, partial, rows, eps),
        warps=8,
        NORM=weight is not None,
        GATE=gate is not None,
        RESIDUAL=to_total is not None,
        **shape,
    )
    return to_x, _summed(partial, weight), to_gate


def _summed(partial: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return None if partial is None or weight is None else partial.sum(0).to(weight.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        run_program(swiglu_forward, -(-y.numel() // LANES), gate, up, y, y.numel(), LANES=LANES)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        run_program(
            swiglu_backward,
            -(-gate.numel() // LANES),
            *(gate, up, to_y.contiguous(), to_gate, to_up, gate.numel()),
            LANES=LANES,
        )
        return to_gate, to_up
