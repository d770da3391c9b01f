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
class PartitionState:
    """What a parameter group steps, each [n] and one behind the other: float32 weights, their rounded copy, moments.

    Attributes:
        factor: the place of the factor by which the group's gradients are divided.
    """

    master: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    factor: int

    def addresses(self, begin: int) -> list[int]:
        """Where each begins in memory, from its element `begin` on."""
        tensors = (self.master, self.weight, self.first, self.second)
        return [x.data_ptr() + begin * x.element_size() for x in tensors]


class FusedStep:
    """Steps a DeepSpeed optimizer of ZeRO-1 or 2 around torch's AdamW, with the same state and the same checkpoints.

    Args:
        gradients: measures and clips them.
        gather: lets every rank have all ranks' weights.
    """

    def __init__(self, zero: Any, gradients: Gradients, gather: Callable[[], None]):
        self._zero, self._gradients, self._gather = zero, gradients, gather
        self._adamw = FusedAdamW()
        self._first_micro_step = zero.micro_step_id
        self._plain_step = zero.step
        zero.step = self.step

    def step(self, closure: None = None) -> None:
        """One step of all groups; DeepSpeed's own if a gradient is not finite, which drops them."""
        zero = self._zero
        self._gradients.measure()
        optimizer, groups = zero.optimizer, range(len(zero.single_partition_of_fp32_groups))
        states = [self._state(group) for group in groups]
        self._adamw.prepare(states, [zero.averaged_gradients[group] for group in groups])
        norm = self._gradients.norms()["gradient_norm"]  # the host waits here, as DeepSpeed's does
        if not math.isfinite(norm):
            self._plain_step(closure)
            return
        steps = [optimizer.state[partition]["step"] for partition in zero.single_partition_of_fp32_groups]
        torch._foreach_add_(steps, 1)
        self._adamw.run(steps[0], self._gradients.factors, optimizer.param_groups[0])
        zero.micro_step_id = self._first_micro_step
        zero.overflow, zero._global_grad_norm = False, norm
        for group in groups:
            zero.free_grad_in_param_list(zero.params_not_in_partition[group])
            zero.free_grad_in_param_list(zero.params_in_partition[group])
            zero._release_preflattened_grad_buffers(group)
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero._lazy_init_hp_params_optimizer_state()
        self._gather()

    def _state(self, group: int) -> PartitionState:
        """The state of this rank's partition of a group, as torch's fused AdamW makes it at its first step."""
        zero = self._zero
        partition = zero.single_partition_of_fp32_groups[group]
        state = zero.optimizer.state[partition]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"] = torch.zeros_like(partition)
            state["exp_avg_sq"] = torch.zeros_like(partition)
        weight, factor = zero.get_bit16_param_group(group)[0], self._gradients.factor_index(group)
        return PartitionState(partition, weight, state["exp_avg"], state["exp_avg_sq"], factor)


class FusedAdamW:
    """AdamW's step of several groups, in place and in one kernel."""

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._tables: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def prepare(self, states: Sequence[PartitionState], gradients: Sequence[Sequence[Tensor]]) -> None:
        """Send what a step needs to the GPU. The host does not wait.

        Args:
            gradients: of each group: one after the other they are the partition's. Padding is marked as DeepSpeed's.
        """
        sizes = [[g.numel() for g in group] for group in gradients]
        self._gradients = [g.contiguous() for group in gradients for g in group if not is_padding(g)]
        key = [sizes, [state.addresses(0) for state in states]]
        device = states[0].master.device
        if key != self._key:  # the first step, and the first after a checkpoint was loaded
            self._key, pieces = key, []
            for state, group in zip(states, gradients, strict=True):
                begin = 0
                for gradient in group:
                    if not is_padding(gradient):
                        pieces.append([*state.addresses(begin), gradient.numel(), state.factor])
                    begin += gradient.numel()
            self._tables = [x.to(device) for x in _tables(pieces)]
            self._even = all(n % 16 == 0 for piece in pieces for n in piece[:5])
            # The host writes there again after it has waited for this step's norm, and so for the copy.
            self._addresses = torch.empty(len(pieces), dtype=torch.long, pin_memory=device.type == "cuda")
        addresses = [g.data_ptr() for g in self._gradients]
        self._aligned = self._even and all(n % 16 == 0 for n in addresses)
        self._addresses.copy_(torch.tensor(addresses, dtype=torch.long))
        self._sent = self._addresses.to(device, non_blocking=True)

    def run(self, step: Tensor, factors: Tensor | None, settings: dict[str, Any]) -> None:
        """Make the step, and forget the gradients.

        Args:
            step: a scalar, the number of steps with this one.
            factors: [n] what gradients are divided by, or None: by nothing.
            settings: lr, betas, eps and weight_decay.
        """
        from halo.training.adamw_kernel import adamw  # Triton does not exist on every machine

        gradients, self._gradients = self._gradients, []
        if not gradients:
            return
        beta_1, beta_2 = settings["betas"]
        adamw[(len(self._tables[1]),)](
            *(self._sent, *self._tables, step, factors, gradients[0], settings["lr"]),
            *(math.log(beta_1), math.log(beta_2), settings["eps"], settings["weight_decay"]),
            CLIPPED=factors is not None,
            ALIGNED=self._aligned,
            LANES=LANES_OF_STEP,
            LOOPS=LOOPS,
        )


def is_padding(gradient: Tensor) -> bool:
    """Whether DeepSpeed made it to fill a partition."""
    return getattr(gradient, "_zero_padding", False)


def _tables(pieces: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's `pieces`, `piece_of` and `begin_of`."""
    table, each = torch.tensor(pieces, dtype=torch.long).view(len(pieces), 6), LANES_OF_STEP * LOOPS
    programs = -(-table[:, 4] // each)
    piece_of = torch.arange(len(pieces)).repeat_interleave(programs)
    begin_of = (torch.arange(len(piece_of)) - (programs.cumsum(0) - programs)[piece_of]) * each
    return table, piece_of.int(), begin_of
