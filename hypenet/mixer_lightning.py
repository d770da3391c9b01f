"""The RNN mixer of HypeNet: Lightning Attention with RoPE, QK-norm, output norm and output gate (paper Eq. 18)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from .cache import HypeNetCache
from .configuration_hypenet import HypeNetConfig
from .lightning import lightning_attention, log_decay


class LightningAttention(nn.Module):
    """An RNN layer. H heads of width D; `z_proj` makes the gate, `o_norm` is one norm over all heads together."""

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.lightning_nh
        self.head_dim = config.lightning_head_dim
        self.queries_per_key = config.lightning_nh // config.lightning_nkv
        self.scaling = self.head_dim**-0.5
        width, kv_width = self.heads * self.head_dim, config.lightning_nkv * self.head_dim

        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = self.o_norm = self.z_proj = None
        if config.lightning_use_qk_norm:
            self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.lightning_use_output_norm:
            self.o_norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        if config.lightning_use_output_gate:
            self.z_proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Qwen3Attention's convention, save for the mask.

        Args:
            hidden_states: [B, T, hidden].
            position_embeddings: RoPE's cos and sin, [B, T, D] each.
            attention_mask: [B, T], 1 at tokens and 0 at padding, or None. In the place of a teacher's attention
                also that attention's [B, 1, T, T]. Where a cache is to be continued, padding must be on the left.
            past_key_values: a `HypeNetCache` to continue from and to update.

        Returns:
            The output, [B, T, hidden], and None in the place of attention weights.

        Raises:
            ValueError: the cache is not a `HypeNetCache`.
        """
        if past_key_values is not None and not isinstance(past_key_values, HypeNetCache):
            raise ValueError(f"RNN layer {self.layer_idx} needs a HypeNetCache: give one, or pass use_cache=False.")

        q, k, v = self.project(hidden_states)
        if self.config.lightning_use_rope:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        if self.queries_per_key > 1:
            k, v = (x.repeat_interleave(self.queries_per_key, dim=2) for x in (k, v))
        if attention_mask is not None:  # what is not a token leaves no trace in the state
            padding = ~_tokens(attention_mask)[..., None, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)

        output, state = lightning_attention(
            q,
            k,
            v,
            log_decay(self.heads, q.device),
            scale=self.scaling,
            initial_state=None if past_key_values is None else past_key_values.state(self.layer_idx),
            output_final_state=past_key_values is not None,
        )
        if past_key_values is not None and state is not None:
            past_key_values.update_state(state, self.layer_idx, hidden_states.shape[1])

        output = output.flatten(2)
        if self.o_norm is not None:
            output = self.o_norm(output)
        if self.z_proj is not None:
            output = output * torch.sigmoid(self.z_proj(hidden_states))
        return self.o_proj(output), None

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values, before RoPE: [B, T, heads, D] each."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def _tokens(mask: Tensor) -> Tensor:
    """[B, T], true at tokens: the padding mask itself, or what the last query of an attention mask may see."""
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        return mask if mask.dtype == torch.bool else mask == 0  # else it is added to the logits
    return mask.bool()
