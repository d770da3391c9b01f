"""RMSNorm in one kernel: read once and written once, in the precision of the input, computed in float32."""

import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .fused import Rope, gated, turn


class RMSNorm(Qwen3RMSNorm):
    """Qwen3's makes seven passes over float32 copies. In half precision this rounds once where that one does twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        weight = self.weight.to(hidden_states.dtype)  # another one under autocast, which the kernel does not take
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


class HeadNorm(RMSNorm):
    """QK-norm (Eq. 12), and RoPE with it."""

    def forward(self, hidden_states: Tensor, rope: Rope | None = None) -> Tensor:
        """[B, T, H, D] -> [B, T, H, D], turned if there is a `rope`."""
        return turn(hidden_states, self.weight, self.variance_epsilon, rope)


class OutputNorm(RMSNorm):
    """The norm before the output gate (Eq. 14), and the gate with it."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """[..., W] -> [..., W], times the sigmoid of `gate`, [..., W], if there is one."""
        if gate is None:
            return super().forward(hidden_states)
        return gated(hidden_states, self.weight, self.variance_epsilon, gate)
