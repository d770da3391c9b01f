"""The attention mixer: softmax attention without RoPE (HyPE), with scaled logits and an output gate (paper Eq. 17)."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    eager_attention_forward,
)

from .cache import the_cache
from .configuration_hypenet import ATTENTION, HypeNetConfig, read_scaling
from .fused import gated, projections, turn
from .implementations import like_sdpa
from .mixers import Mixer, mixer
from .norm import HeadNorm


def logits_scale(positions: Tensor, spec: str | float) -> Tensor:
    """s_t of Eq. 11, for `attn_logits_scaling` of the configuration: log_a(t + a) for "hype a", else a constant.

    Args:
        positions: 0-based absolute positions t, any shape.

    Returns:
        float32, in the shape of `positions`.

    Raises:
        ValueError: `spec` is neither a number nor "hype a" with a > 1.
    """
    form, value = read_scaling(spec)
    if form == "constant":
        return torch.full_like(positions, value, dtype=torch.float32)
    return torch.log(positions.float() + value) / math.log(value)


def tokens_seen(seq_len: int, window: int | None) -> float:
    """How many tokens a token sees in causal attention, on average: T/2, or w - w^2 / 2T in a window of w < T."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)


@mixer(ATTENTION)
class HypeNetAttention(Mixer, Qwen3Attention):
    """Qwen3's attention without RoPE, with the queries scaled by s_t in evaluation and the output gated (`o_gate`)."""

    split = "attention"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Qwen3's own would have QK-norm and no biases always
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window: Any = None  # mixer_swa.py has one
        self.use_rope = config.attn_use_rope
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim

        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attn_qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attn_qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attn_qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attn_o_bias)
        self.q_norm = self.k_norm = self.o_gate = None
        if config.attn_use_qk_norm:
            self.q_norm = HeadNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = HeadNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.attn_use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        rows_apart: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Qwen3Attention's convention.

        Args:
            hidden_states: [B, T, hidden].
            attention_mask: in the form of `config._attn_implementation`, e.g. [B, 1, T, S].
            past_key_values, cache: two names of one argument, the cache to continue from and to update.
            position_ids: [B, T] or [1, T], needed for the scaling of logits.
            rows_apart: what RNN layers are told beside their mask; the mask of attention has it.

        Returns:
            The output, [B, T, hidden], and the attention weights if the implementation returns them.

        Raises:
            ValueError: logits must be scaled and there are no positions.
        """
        q, k, v, gate = projections(hidden_states, self.q_proj, self.k_proj, self.v_proj, self.o_gate)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (x.view(shape) for x in (q, k, v))
        rope = position_embeddings if self.use_rope else None
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, rope), self.k_norm(k, rope)
        else:
            q, k = turn(q, None, 0.0, rope), turn(k, None, 0.0, rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]

        q = self.scale_logits(q, position_ids)
        cache = the_cache(past_key_values, cache)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        output, weights = self.attend(q, k, v, attention_mask, **kwargs)

        output = output.flatten(2)
        if gate is not None:
            output = gated(output, None, 0.0, gate)
        return self.o_proj(output), weights

    def multiply_adds(self, seq_len: int) -> float:
        """D each to multiply a query with a key, and a weight with a value."""
        return 2 * self.head_dim * tokens_seen(seq_len, self.sliding_window)

    def scale_logits(self, q: Tensor, positions: Tensor | None) -> Tensor:
        """Eq. 11, in evaluation only: q, [B, H, T, D], times s_t."""
        if self.config.attn_logits_scaling is None or self.training:
            return q
        if positions is None:
            raise ValueError(f"Attention layer {self.layer_idx} needs position_ids to scale its logits.")
        scale = logits_scale(positions, self.config.attn_logits_scaling)
        return (q * scale[:, None, :, None]).to(q.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention of rows. Of packed documents without a mask, with sdpa and its like: of each alone.

        Args:
            q: [B, H, T, D].
            k, v: [B, KV heads, S, D].
            attention_mask: in the form of `config._attn_implementation`.
            kwargs: among them `cu_seq_lens_q`, [documents + 1], the bounds of documents packed into the B x T tokens.

        Returns:
            The output, [B, T, H, D], and the attention weights if the implementation returns them.
        """
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None or attention_mask is not None or not like_sdpa(self.implementation):
            return self.attend_rows(q, k, v, attention_mask, **kwargs)
        q_, k_, v_ = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
        documents = [
            self.attend_rows(q_[:, :, a:b], k_[:, :, a:b], v_[:, :, a:b], None)[0] for a, b in pairwise(bounds.tolist())
        ]
        return torch.cat(documents, dim=1).view(q.shape[0], q.shape[2], *q.shape[1::2]), None

    @property
    def implementation(self) -> str:
        """The name of the implementation of softmax attention."""
        return self.config._attn_implementation or "sdpa"  # outside of a model none is chosen

    def attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` of rows: each is one sequence unless the mask says otherwise."""
        attention = (
            eager_attention_forward if self.implementation == "eager" else ALL_ATTENTION_FUNCTIONS[self.implementation]
        )
        dropout = self.attention_dropout if self.training else 0.0
        return attention(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
