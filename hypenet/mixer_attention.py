"""The attention mixer: softmax attention with HyPE, NoPE and scaled logits, and an output gate (paper Eq. 17)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb, eager_attention_forward

from .configuration_hypenet import HypeNetConfig


def logits_scale(positions: Tensor, spec: str | float) -> Tensor:
    """s_t of Eq. 11, for `attn_logits_scaling` of the configuration: log_a(t + a) for "hype a", else a constant.

    Args:
        positions: 0-based absolute positions t, any shape.

    Returns:
        float32, in the shape of `positions`.

    Raises:
        ValueError: `spec` is neither a number nor "hype a" with a > 1.
    """
    if isinstance(spec, int | float):
        return torch.full_like(positions, spec, dtype=torch.float32)
    name, _, base = spec.partition(" ")
    try:
        a = float(base)
    except ValueError:
        a = math.nan
    if name != "hype" or not a > 1:
        raise ValueError(f"attn_logits_scaling must be None, a number, or 'hype a' with a > 1, not {spec!r}.")
    return torch.log(positions.float() + a) / math.log(a)


class HypeNetAttention(Qwen3Attention):
    """Qwen3's attention without RoPE, with the queries scaled by s_t in evaluation and the output gated (`o_gate`)."""

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.o_gate = None
        if config.attn_use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Qwen3Attention's convention.

        Args:
            hidden_states: [B, T, hidden].
            attention_mask: what `config._attn_implementation` takes, e.g. [B, 1, T, S].
            position_ids: [B, T] or [1, T], needed for the scaling of logits.

        Returns:
            The output, [B, T, hidden], and the attention weights where the implementation gives them.

        Raises:
            ValueError: logits are to be scaled and there are no positions.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)

        if self.config.attn_use_rope:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if self.config.attn_logits_scaling is not None and not self.training:
            if position_ids is None:
                raise ValueError(f"Attention layer {self.layer_idx} needs position_ids to scale its logits.")
            scale = logits_scale(position_ids, self.config.attn_logits_scaling)
            q = (q * scale[:, None, :, None]).to(q.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        implementation = self.config._attn_implementation
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

        output = output.flatten(2)
        if self.o_gate is not None:
            output = output * torch.sigmoid(self.o_gate(hidden_states))
        return self.o_proj(output), weights
