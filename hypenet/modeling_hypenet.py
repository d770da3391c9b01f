"""HypeNet: Qwen3 with a mixer of its own in every layer (paper Appendix A). Only what differs from Qwen3 is here."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

# Every file of the model is named here, also those that only others use: an import registers a mixer, and
# transformers 4 loads exported code with no more files than these.
# ruff: noqa: F401
from .cache import HypeNetCache
from .configuration_hypenet import SLIDING_WINDOW, HypeNetConfig
from .kernels import serves
from .linear_attention import linear_attention
from .mixer_attention import HypeNetAttention
from .mixer_lightning import LightningAttention
from .mixers import build_mixer
from .rnn_mixer import RNNMixer

_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)


def layer_masks(
    config: HypeNetConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: HypeNetCache | None,
    position_ids: Tensor | None,
) -> dict[str, Any]:
    """A mask for each kind of layer: for attention in the form that `config._attn_implementation` takes.

    The one call whose arguments differ between the versions of transformers.

    Args:
        position_ids: [B, T], where documents are packed: a token sees no other document. Else None.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    tokens = inputs_embeds.shape[1]
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "input_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache_position": torch.arange(seen, seen + tokens, device=inputs_embeds.device),
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    arguments = {name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS}
    masks: dict[str, Any] = {"linear_attention": None if attention_mask is None else attention_mask[:, -tokens:]}
    if "full_attention" in config.layer_types:
        masks["full_attention"] = create_causal_mask(**arguments)
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks


def documents(position_ids: Tensor | None, bounds: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The bounds of documents packed into B x T tokens, [documents + 1] in int32, or None: each row is one document.

    Args:
        position_ids: [B or 1, T], counting from 0 anew in each document; where `bounds` is not known.
        bounds: what the caller gives as `cu_seq_lens_q`.
    """
    if bounds is not None or position_ids is None:
        return bounds
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff() != 1
    if not begins[:, 1:].any():
        return None
    bounds = begins.expand(batch, tokens).flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([batch * tokens])]).int()


class HypeNetRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's, with frequencies that stay in float32 when the model is cast.

    `model.bfloat16()`, which DeepSpeed calls too, casts buffers as well; a frequency in bfloat16 is off by a
    radian after a few hundred tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class HypeNetDecoderLayer(Qwen3DecoderLayer):
    """Eq. 15 and 16: Qwen3's layer around the mixer that the configuration names."""

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Qwen3's own would build an attention only to throw it away
        self.hidden_size = config.hidden_size
        self.attention_type = config.layer_types[layer_idx]
        self.self_attn = build_mixer(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class HypeNetPreTrainedModel(Qwen3PreTrainedModel):
    config: HypeNetConfig
    _no_split_modules = ["HypeNetDecoderLayer"]  # noqa: RUF012
    _can_compile_fullgraph = False
    _is_stateful = True  # a state cannot be rolled back, as assisted generation would


class HypeNetModel(HypeNetPreTrainedModel, Qwen3Model):
    """The decoder without its head."""

    def __init__(self, config: HypeNetConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([HypeNetDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HypeNetRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Qwen3Model's, with a mask for each kind of mixer.

        Args:
            input_ids: [B, T]; or `inputs_embeds`, [B, T, hidden].
            attention_mask: [B, S], 1 at tokens and 0 at padding, over all S tokens seen with these T.
            position_ids: [B, T] or [1, T], 0-based. By default counted from the mask, so padding has no position.
                Without a mask and a cache, positions that start anew mark packed documents: no attention and no
                state crosses from one to the next.
            past_key_values: the cache to continue.
            use_cache: whether to return a cache. By default as `config.use_cache` says, and never in training or
                for packed documents.
            kwargs: among them `cu_seq_lens_q`, [documents + 1] in int32, the bounds of packed documents in the
                B x T tokens, and the rest of what transformers' `DataCollatorWithFlattening` gives.

        Raises:
            ValueError: an argument does not fit the others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if past_key_values is not None and not isinstance(past_key_values, HypeNetCache):
            raise ValueError(f"past_key_values must be a HypeNetCache, not a {type(past_key_values).__name__}.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, tokens = inputs_embeds.shape[:2]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.shape[1:] != (seen + tokens,):
            raise ValueError(
                f"attention_mask must be [batch, {seen + tokens}], one entry for every token seen so far, "
                f"not {list(attention_mask.shape)}."
            )

        bounds = kwargs.pop("cu_seq_lens_q", None)
        if attention_mask is None and past_key_values is None:
            bounds = documents(position_ids, bounds, batch, tokens)
        if bounds is not None:
            if attention_mask is not None or past_key_values is not None or use_cache:
                raise ValueError("Packed documents take neither attention_mask nor a cache: each is a sequence alone.")
            use_cache = False
            position_ids = _positions_in_documents(bounds, batch)
            longest = int(bounds.diff().max())
            kwargs |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        masks = layer_masks(
            self.config, inputs_embeds, attention_mask, past_key_values, None if bounds is None else position_ids
        )
        if position_ids is None:
            position_ids = _positions(attention_mask, seen, tokens, inputs_embeds.device)

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = HypeNetCache(self.config)
        # Qwen3's own forward picks a layer's mask by `config.layer_types`.
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


def _positions(attention_mask: Tensor | None, seen: int, tokens: int, device: torch.device) -> Tensor:
    """0-based positions of the last `tokens` tokens: [1, T], or [B, T] where a mask says what is padding."""
    if attention_mask is None:
        return torch.arange(seen, seen + tokens, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _positions_in_documents(bounds: Tensor, batch: int) -> Tensor:
    """0-based positions, [B, T], each document counting from 0."""
    lengths = bounds.diff()
    within = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    return within.view(batch, -1)


class HypeNetForCausalLM(HypeNetPreTrainedModel, Qwen3ForCausalLM):
    """HypeNet with its language-model head. `forward` is Qwen3's: labels, logits_to_keep, tied or untied head."""

    def __init__(self, config: HypeNetConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = HypeNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Have `generate` begin with the hybrid cache.

        Raises:
            ValueError: `cache_implementation` asks for another one.
        """
        if generation_config.cache_implementation is not None:
            raise ValueError("HypeNet has one cache, HypeNetCache: leave cache_implementation unset.")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HypeNetCache(self.config)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As for any model, but positions are left to `forward`, which counts them from the mask.

        transformers 4 counts padding too where it prefills in chunks.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs
