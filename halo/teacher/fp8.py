"""A teacher whose decoder layers multiply in FP8 (e4m3): about half the time of bf16's products, half the memory.

    y = (x8 w8^T) s t^T + b     x8 = e4m3(x / s), w8 = e4m3(w / t)

Each row of the input has a scale s, and each row of the weight, an output's, has a scale t: with it, the largest
magnitude of the row is the largest number of e4m3. Embedding, norms, attention and head stay as they are. The teacher's
logits change by more than bf16 rounds them (docs/performance.md): so it is a setting of stage 2, and off.

The products are cuBLAS's or CUTLASS's on a GPU; elsewhere operands are converted to float32 and multiplied there, which
is the reference. Inputs become FP8 in one kernel (halo/teacher/fp8_kernel.py), whose reference is `quantise_rows`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from halo.errors import UserError
from halo.models.attention import Machine, this_machine
from hypenet.fused import WIDEST, fused_kernel_serves

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
E4M3_TINY = 1e-30
"""A row's largest magnitude counts as at least this: so a row of zeros has a scale, and the inverse is finite."""
FP8_CAPABILITY = (8, 9)
"""The first compute capability with FP8 products."""
FP8_MULTIPLE = 16
"""What both widths of a weight must be a multiple of."""
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same input, one after the other."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, W] -> (e4m3 [N, W], the float32 scale [N, 1] of each row), whose product is about x."""
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=E4M3_TINY)
    most = torch.full_like(largest, E4M3_MAX)  # with a number, torch on a GPU multiplies by a rounded inverse
    return (x.float() * (most / largest)).to(torch.float8_e4m3fn), largest / most


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows`, by the kernel for half precision on a GPU. Rows that are wider than its are plain torch's."""
    if fused_kernel_serves(x) and x.shape[-1] <= WIDEST:
        from halo.teacher.fp8_kernel import quantise_rows_triton  # Triton does not exist on every machine

        return quantise_rows_triton(x, E4M3_MAX, E4M3_TINY)
    return quantise_rows(x)


class SharedInput:
    """An input in FP8, made once for the layers that read it one after the other, and dropped after the last of them.

    Args:
        readers: how many layers these are.
    """

    def __init__(self, readers: int):
        self._readers = readers
        self._left = 0
        self._of: Tensor | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., W] -> what `quantise_rows` makes of its N rows."""
        if self._rows is None or self._of is not x:
            self._of, self._rows, self._left = x, quantised(x.flatten(0, -2)), self._readers
        rows = self._rows
        self._left -= 1
        if self._left == 0:
            self._of = self._rows = None
        return rows


class Fp8Linear(nn.Module):
    """A frozen linear layer that multiplies in FP8. It has no gradients.

    Args:
        linear: the layer that it is made from. Both widths are multiples of FP8_MULTIPLE.
        shared: of the layers that read the same input, this one among them. None: no other does.

    Attributes:
        weight: e4m3, [out, in].
        scale: float32, [1, out].
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, shared: SharedInput | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias
        self._shared = shared or SharedInput(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the precision of x: on a GPU bf16."""
        y = self.product(*self._shared.rows(x))
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def product(self, rows: Tensor, scales: Tensor) -> Tensor:
        """An input [N, in] as `quantise_rows` makes it -> [N, out]: bf16 on a GPU, float32 elsewhere."""
        if rows.is_cuda:
            operands = {"scale_a": scales, "scale_b": self.scale}
            y = torch._scaled_mm(rows, self.weight.T, **operands, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            y = (rows.float() @ self.weight.float().T) * scales * self.scale
        return y if self.bias is None else y.add_(self.bias)  # not by cuBLAS: it refuses a bias for a few rows

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.no_grad()
def to_fp8(layer: nn.Module) -> None:
    """Replace all linear layers in a decoder layer. Each weight is freed before the next is converted."""
    for module in list(layer.modules()):
        names = {name for name, child in module.named_children() if type(child) is nn.Linear}
        groups = [[name for name in group if name in names] for group in ONE_INPUT]
        groups += [[name] for name in names.difference(*ONE_INPUT)]
        for group in groups:
            shared = SharedInput(len(group))
            for name in group:
                setattr(module, name, Fp8Linear(module.get_submodule(name), shared))  # type: ignore[arg-type]


def check_fp8(layers: Iterable[nn.Module], machine: Machine | None = None) -> None:
    """Check that this machine can run a teacher's decoder layers in FP8. They may be on the meta device.

    Args:
        machine: None: this one.

    Raises:
        UserError: it cannot.
    """
    capability, needs = (machine or this_machine()).capability, ".".join(map(str, FP8_CAPABILITY))
    where = f"distill.teacher_fp8 needs an NVIDIA GPU of compute capability {needs} or newer"
    if capability is None or torch.version.hip is not None:
        raise UserError(f"{where}, and there is none: set it to false")
    if capability < FP8_CAPABILITY:
        raise UserError(f"{where}, not {'.'.join(map(str, capability))}: set it to false")
    check_fp8_widths(layers)


def check_fp8_widths(layers: Iterable[nn.Module]) -> None:
    """Raises:
    UserError: a weight of a teacher's decoder layers cannot be multiplied in FP8.
    """
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and any(width % FP8_MULTIPLE for width in module.weight.shape):
                out_width, in_width = module.weight.shape
                raise UserError(
                    f"distill.teacher_fp8 needs weights whose widths are multiples of {FP8_MULTIPLE}, and the "
                    f"teacher's {name} is {out_width} x {in_width}: set it to false"
                )
