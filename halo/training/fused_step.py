"""ZeRO-1's and ZeRO-2's step in one kernel a gradient, in place of DeepSpeed's `step`.

DeepSpeed joins a layer's gradients, converts them to float32, runs AdamW, and copies the weights to bf16: 44 bytes a
parameter, and the GPU waits for the host between layers. Here AdamW reads each gradient where it lies, and writes both
weights: 28 bytes. DeepSpeed's own step is the reference, and handles a step that must be skipped.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halo.training.gradients import Gradients
from hypenet.kernels import has_triton

STEPPED_AT_ONCE = 2048
"""Elements that a program steps."""


def fused_step_serves(zero: Any) -> bool:
    """Whether the kernel can step a DeepSpeed optimizer: ZeRO-1 or 2 on a GPU, without offloading, Triton installed."""
    if hasattr(zero, "fp16_groups") or zero.cpu_offload:  # ZeRO-3, or an optimizer on the host
        return False
    return all(p.is_cuda for p in zero.single_partition_of_fp32_groups) and has_triton()


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
        if not math.isfinite(norm):  # the host waits here, as DeepSpeed's does
            self._plain_step(closure)
            return
        zero.micro_step_id = self._first_micro_step
        zero.overflow, zero._global_grad_norm = False, norm
        states = [self._state(p) for p in zero.single_partition_of_fp32_groups]
        torch._foreach_add_([state["step"] for state in states], 1)
        for group, state in enumerate(states):
            zero.free_grad_in_param_list(zero.params_not_in_partition[group])
            self._step_group(group, state)
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

    def _step_group(self, group: int, state: dict[str, Tensor]) -> None:
        zero = self._zero
        master, weight = zero.single_partition_of_fp32_groups[group], zero.get_bit16_param_group(group)[0]
        settings, factor = zero.optimizer.param_groups[group], self._gradients.factor(group)
        begin = 0
        for gradient in zero.averaged_gradients[group]:  # one after the other they are the partition's
            part = slice(begin, begin + gradient.numel())
            begin = part.stop
            if getattr(gradient, "_zero_padding", False):
                continue
            first, second = state["exp_avg"][part], state["exp_avg_sq"][part]
            fused_adamw(
                gradient.contiguous(), master[part], first, second, weight[part], state["step"], factor, settings
            )


def fused_adamw(
    gradient: Tensor,
    master: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    step: Tensor,
    factor: Tensor | None,
    settings: dict[str, Any],
) -> None:
    """AdamW's step of n elements, in place.

    Args:
        gradient, weight: [n] in the precision of the model.
        master, first, second: [n] float32: the weights and their moments.
        step: a scalar, the number of steps with this one.
        factor: a scalar by which gradients are divided, or None.
        settings: lr, betas, eps and weight_decay.
    """
    from halo.training.adamw_kernel import adamw  # Triton does not exist on every machine

    beta_1, beta_2 = settings["betas"]
    adamw[(-(-gradient.numel() // STEPPED_AT_ONCE),)](
        *(gradient, master, first, second, weight, step, factor, settings["lr"]),
        *(math.log(beta_1), math.log(beta_2), settings["eps"], settings["weight_decay"], gradient.numel()),
        CLIPPED=factor is not None,
        LANES=STEPPED_AT_ONCE,
    )
