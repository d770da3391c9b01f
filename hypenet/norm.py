"""RMSNorm in one kernel: read once and written once, in the precision of the input, computed in float32."""

from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from .fused import Rope, gated, normed, turn


class RMSNorm(Qwen3RMSNorm):
    """Qwen3's makes seven passes over float32 copies. In half precision this rounds once where that one does twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return normed(hidden_states, None, self.weight, self.variance_epsilon)[0]


class ResidualNorm(RMSNorm):
    """The norm before a mixer or an MLP, and the residual stream that passes it (Eq. 15 and 16)."""

    def forward(self, hidden_states: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """hidden_states and `delta`, what the last mixer adds to them, [..., D] -> (the norm of the sum, the sum)."""
        return normed(hidden_states, delta, self.weight, self.variance_epsilon)


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
