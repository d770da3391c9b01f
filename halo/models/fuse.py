"""A teacher on HypeNet's kernels (hypenet/fused.py): the same function, in fewer passes over memory.

transformers' own norms, RoPE and MLPs run a kernel for each operation, most of them in float32.
"""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from halo.models.families import window_of
from hypenet.mixer_attention import HypeNetAttention
from hypenet.modeling_hypenet import HypeNetDecoderLayer, HypeNetMLP
from hypenet.norm import HeadNorm, ResidualNorm, RMSNorm


def fuse(model: PreTrainedModel) -> None:
    """Run the layers of a `model` of hypenet.transfer.TEACHERS with HypeNet's forwards. Its weights do not change."""
    for layer in model.model.layers:
        layer.mlp.forward = partial(HypeNetMLP.forward, layer.mlp)
        _fuse_attention(layer.self_attn)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(ResidualNorm.forward, norm)
        layer.forward = partial(HypeNetDecoderLayer.forward, layer)
    model.model.norm.forward = partial(RMSNorm.forward, model.model.norm)


def _fuse_attention(attention: Any) -> None:
    """Give a teacher's own module HypeNetAttention's forward, with RoPE, without scaled logits and gate."""
    for name in ("q_norm", "k_norm"):
        norm: nn.Module | None = getattr(attention, name, None)
        if norm is not None:
            norm.forward = partial(HeadNorm.forward, norm)  # type: ignore[arg-type]
        setattr(attention, name, norm)
    attention.heads, attention.split = attention.config.num_attention_heads, HypeNetAttention.split
    attention.use_rope, attention.o_gate = True, None
    attention.scale_logits = lambda q, _: q
    attention.implementation = attention.config._attn_implementation or "sdpa"
    attention.attend = partial(HypeNetAttention.attend, attention)
    attention.attend_rows = partial(HypeNetAttention.attend_rows, attention, sliding_window=window_of(attention))
    attention.forward = partial(HypeNetAttention.forward, attention)
