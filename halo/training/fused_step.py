"""ZeRO-1's and ZeRO-2's step in one kernel, in place of DeepSpeed's `step`.

DeepSpeed joins a layer's gradients, converts them to float32, runs AdamW, and copies the weights to bf16: 44 bytes a
parameter, and the GPU waits for the host between layers. Here AdamW reads each gradient where it lies, and writes both
weights: 28 bytes. DeepSpeed's own step is the reference, and handles a step that must be skipped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halo.training.gradients import Gradients
from hypenet.kernels import has_triton

LANES_OF_STEP, LOOPS = 1024, 32
"""Elements that a program steps at a time, and how often it does."""


def fused_step_serves(zero: Any) -> bool:
    """Whether the kernel can step a DeepSpeed optimizer: ZeRO-1 or 2 on a GPU, without offloading, Triton installed."""
    if hasattr(zero, "fp16_groups") or zero.cpu_offload:  # ZeRO-3, or an optimizer on the host
        return False
    return all(p.is_cuda for p in zero.single_partition_of_fp32_groups) and has_triton()


@dataclass(frozen=True)
class GradientPiece:
    """A gradient [n], the part of the state that it steps, and which of the factors it is divided by.

    `master`, `first` and `second` are float32: the weights and their moments. `weight` has the gradient's precision.
    """

    gradient: Tensor
    master: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    factor: int


class FusedStep:
    """Steps a DeepSpeed optimizer of ZeRO-1 or 2 around torch's AdamW, with the same state and the same checkpoints.

    Args:
        gradients: measures and clips them.
        gather: lets every rank have all ranks' weights.
    """

    def __init__(self, zero: Any, gradients: Gradients, gather: Callable[[], None]):
        self._zero, self._gradients, self._gather = zero, gradients, gather
        self._first_micro_step = zero.micro_step_id
        self._plain_step = zero.step
        zero.step = self.step

    def step(self, closure: None = None) -> None:
        """One step of all groups; DeepSpeed's own if a gradient is not finite, which drops them."""
        zero = self._zero
        norm = self._gradients.measure()
        states = [self._state(p) for p in zero.single_partition_of_fp32_groups]
        pieces = [piece for group, state in enumerate(states) for piece in self._pieces(group, state)]
        step = prepared_adamw(pieces, states[0]["step"], self._gradients.factors, zero.optimizer.param_groups[0])
        if not math.isfinite(norm):  # the host waits here, as DeepSpeed's does
            self._plain_step(closure)
            return
        torch._foreach_add_([state["step"] for state in states], 1)
        step()
        zero.micro_step_id = self._first_micro_step
        zero.overflow, zero._global_grad_norm = False, norm
        for group in range(len(states)):
            zero.free_grad_in_param_list(zero.params_not_in_partition[group])
            zero.free_grad_in_param_list(zero.params_in_partition[group])
            zero._release_preflattened_grad_buffers(group)
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero._lazy_init_hp_params_optimizer_state()
        self._gather()

    def _state(self, partition: Tensor) -> dict[str, Tensor]:
        """The state of a partition as torch's fused AdamW makes it at its first step."""
        state = self._zero.optimizer.state[partition]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"] = torch.zeros_like(partition)
            state["exp_avg_sq"] = torch.zeros_like(partition)
        return state

    def _pieces(self, group: int, state: dict[str, Tensor]) -> list[GradientPiece]:
        """The gradients of this rank's partition of a group. One after the other they are the partition's."""
        zero, begin, pieces = self._zero, 0, []
        master, weight = zero.single_partition_of_fp32_groups[group], zero.get_bit16_param_group(group)[0]
        first, second, factor = state["exp_avg"], state["exp_avg_sq"], self._gradients.factor_index(group)
        for gradient in zero.averaged_gradients[group]:
            part = slice(begin, begin + gradient.numel())
            begin = part.stop
            if not getattr(gradient, "_zero_padding", False):
                piece = GradientPiece(
                    gradient.contiguous(), master[part], weight[part], first[part], second[part], factor
                )
                pieces.append(piece)
        return pieces


def prepared_adamw(
    pieces: Sequence[GradientPiece], step: Tensor, factors: Tensor | None, settings: dict[str, Any]
) -> Callable[[], None]:
    """A function that makes AdamW's step, in place. What it needs is on its way to the GPU.

    Args:
        step: a scalar, when the function is called the number of steps with this one.
        factors: [n] what gradients are divided by, or None: by nothing.
        settings: lr, betas, eps and weight_decay.
    """
    from halo.training.adamw_kernel import adamw  # Triton does not exist on every machine

    device, each = step.device, LANES_OF_STEP * LOOPS
    sizes = torch.tensor([piece.gradient.numel() for piece in pieces], dtype=torch.long)
    tensors = [(p.gradient, p.master, p.weight, p.first, p.second) for p in pieces]
    places = torch.tensor([[x.data_ptr() for x in row] for row in tensors]).view(len(pieces), 5)
    last = torch.tensor([piece.factor for piece in pieces], dtype=torch.long)
    programs = -(-sizes // each)
    piece_of = torch.repeat_interleave(torch.arange(len(pieces)), programs)
    begin_of = (torch.arange(len(piece_of)) - (programs.cumsum(0) - programs)[piece_of]) * each
    table = torch.cat([places, sizes[:, None], last[:, None]], dim=1)
    beta_1, beta_2 = settings["betas"]
    tables = [_sent(x, device) for x in (table, piece_of.int(), begin_of)]
    aligned = not bool((places % 16).any() or (sizes % 16).any())

    def run() -> None:
        if len(piece_of):
            adamw[(len(piece_of),)](
                *(*tables, step, factors, pieces[0].gradient, settings["lr"]),
                *(math.log(beta_1), math.log(beta_2), settings["eps"], settings["weight_decay"]),
                CLIPPED=factors is not None,
                ALIGNED=aligned,
                LANES=LANES_OF_STEP,
                LOOPS=LOOPS,
            )

    return run


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without a wait of the host."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
