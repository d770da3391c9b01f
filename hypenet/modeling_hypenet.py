"""HypeNet: Qwen3 with its own mixer in every layer (paper Appendix A). Only what differs from Qwen3 is here."""

import copy
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

# Every file of the model is imported here, also those that only others use: an import registers a mixer, and
# transformers 4 loads exported code with these files only.
# ruff: noqa: F401
from .cache import CACHE, HypeNetCache, the_cache
from .configuration_hypenet import HypeNetConfig
from .delta_rule import delta_rule
from .fixed_decay import fixed_decay_attention
from .fixed_decay_kernels import segment_outputs
from .fused import projections, swiglu
from .fused_kernels import triton
from .implementations import like_sdpa
from .inputs import (
    cached_tokens,
    checked_mask,
    documents,
    known_arguments,
    layer_masks,
    packed_arguments,
    padding_to_pass,
    positions,
)
from .kernels import serves
from .linear_attention import linear_attention
from .loss_kernels import cross_entropy_rows
from .losses import IGNORE, next_token_loss
from .mixer_attention import HypeNetAttention
from .mixer_deltanet import DeltaNet
from .mixer_gdn import GatedDeltaNet
from .mixer_gla import GatedLinearAttention
from .mixer_gsa import GatedSlotAttention
from .mixer_hgrn2 import HGRN2
from .mixer_kda import KimiDeltaAttention
from .mixer_lightning import LightningAttention
from .mixer_linear_attn import LinearAttention
from .mixer_mamba2 import Mamba2
from .mixer_retnet import Retention
from .mixer_rwkv7 import RWKV7
from .mixer_swa import SlidingWindowAttention
from .mixer_ttt import TTTLinear
from .mixers import Mixer, build_mixer
from .norm import ResidualNorm, RMSNorm
from .rnn_mixer import RNNMixer
from .rope import ORIGINAL, read_rope


class HypeNetRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's, with frequencies that stay in float32 when the model is cast.

    `model.bfloat16()`, which DeepSpeed calls too, casts buffers as well; a frequency in bfloat16 is off by a
    radian after a few hundred tokens.

    Dynamic RoPE grows from the teacher's length: transformers would take the length that the hybrid supports.
    """

    def __init__(self, config: HypeNetConfig) -> None:
        rope = read_rope(vars(config))
        if rope["rope_type"] == "dynamic" and rope[ORIGINAL] != config.max_position_embeddings:
            config = copy.copy(config)
            config.max_position_embeddings = rope[ORIGINAL]
        super().__init__(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class HypeNetMLP(Qwen3MLP):
    """Qwen3's, with SwiGLU in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if self.config.hidden_act != "silu":
            return Qwen3MLP.forward(self, x)  # by name: halo/models/fuse.py gives this forward to a teacher's own MLPs
        return self.down_proj(swiglu(*projections(x, self.gate_proj, self.up_proj)))


class HypeNetDecoderLayer(Qwen3DecoderLayer):
    """Eq. 15 and 16: Qwen3's layer around the mixer that the configuration names."""

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Qwen3's own would build an attention only to throw it away
        self.hidden_size = config.hidden_size
        self.attention_type = config.layer_types[layer_idx]
        self.self_attn = build_mixer(config, layer_idx)
        self.mlp = HypeNetMLP(config)
        self.input_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden].

        Args:
            kwargs: the mixer's (`HypeNetAttention.forward`, `RNNMixer.forward`).
        """
        normed, residual = self.input_layernorm(hidden_states)
        mixed, _ = self.self_attn(hidden_states=normed, **kwargs)
        normed, residual = self.post_attention_layernorm(residual, mixed)
        return residual + self.mlp(normed)


class HypeNetPreTrainedModel(Qwen3PreTrainedModel):
    config: HypeNetConfig
    _no_split_modules = ["HypeNetDecoderLayer"]  # noqa: RUF012
    _can_compile_fullgraph = False
    _supports_attention_backend = False  # the generic backends of vLLM and SGLang keep no states between steps
    _is_stateful = True  # a state cannot be rolled back, as assisted generation would

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' own, which knows neither our norms nor the parameters of mixers. What is loaded stays."""
        super()._init_weights(module)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        for name, value in module.first_values().items() if isinstance(module, Mixer) else ():
            parameter = module.get_parameter(name)
            # ZeRO-3 partitions a parameter as soon as the mixer has made it, with its first value.
            if not getattr(parameter, "_is_hf_initialized", False) and not hasattr(parameter, "ds_id"):
                parameter.copy_(value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, with its arguments. A weight that is missing or has no place is an error, not a warning.

        Raises:
            ValueError: the weights do not fit the configuration.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            # They are reported below, with the rest. Under ZeRO-3 parameters have no shapes to compare yet.
            ignore_mismatched_sizes=ignore_mismatched_sizes or not is_deepspeed_zero3_enabled(),
            output_loading_info=True,
            **kwargs,
        )
        headless = not hasattr(model, "lm_head")
        unknown = [name for name in info["unexpected_keys"] if not (headless and name.startswith("lm_head."))]
        problems = {"missing": info["missing_keys"], "unknown": unknown}
        if not ignore_mismatched_sizes:  # transformers 5 adds the shapes to the names
            problems["of another shape"] = [
                name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]
            ]
        if any(problems.values()):
            said = "; ".join(f"{kind}: {_enumerated(names)}" for kind, names in problems.items() if names)
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} do not fit its configuration ({cls.__name__}): {said}."
            )
        return (model, info) if output_loading_info else model


def _enumerated(names: Collection[str], most: int = 12) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class HypeNetModel(HypeNetPreTrainedModel, Qwen3Model):
    """The decoder without its head."""

    def __init__(self, config: HypeNetConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([HypeNetDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        cache: HypeNetCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Qwen3Model's, with a mask for each kind of mixer.

        Args:
            input_ids: [B, T]; or `inputs_embeds`, [B, T, hidden].
            attention_mask: [B, S], 1 at tokens and 0 at padding, over all S tokens seen with these T.
            position_ids: [B, T] or [1, T], 0-based. By default counted from the mask. Without a mask and a cache,
                positions that restart at 0 mark packed documents: neither attention nor state crosses between them.
            past_key_values, cache: two names of one argument, the cache to continue.
            use_cache: whether to return a cache. By default `config.use_cache`, but never in training or for packed
                documents.
            kwargs: among them `cu_seq_lens_q`, in fla `cu_seqlens`, [documents + 1] in int32, the bounds of packed
                documents in the B x T tokens; and the other outputs of transformers' `DataCollatorWithFlattening`.

        Raises:
            TypeError: an argument that neither this model nor transformers has.
            ValueError: an argument does not fit the others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        kwargs, seen = known_arguments(kwargs), cached_tokens(cache := the_cache(past_key_values, cache))
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = inputs_embeds.shape[:2]
        attention_mask = checked_mask(attention_mask, seen, tokens)
        bounds, apart = kwargs.pop("cu_seq_lens_q", None), None
        if cache is None:
            bounds = documents(position_ids, bounds, attention_mask, batch, tokens)
        if bounds is not None:
            if attention_mask is not None or cache is not None or use_cache:
                raise ValueError("Packed documents take neither attention_mask nor a cache: each is a sequence alone.")
            position_ids, apart, packed = packed_arguments(self.config, bounds, position_ids, inputs_embeds)
            kwargs, use_cache = kwargs | packed, False
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = HypeNetCache(self.config)
        if "linear_attention" in self.config.layer_types:
            kwargs["rows_apart"] = padding_to_pass(attention_mask, tokens, cache, training=self.training)
        masks = layer_masks(self.config, inputs_embeds, attention_mask, cache, apart)
        if position_ids is None:
            position_ids = positions(attention_mask, seen, tokens, inputs_embeds.device)
        # Qwen3's own forward picks a layer's mask by `config.layer_types`.
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class HypeNetForCausalLM(HypeNetPreTrainedModel, Qwen3ForCausalLM):
    """HypeNet with its language-model head."""

    def __init__(self, config: HypeNetConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = HypeNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _load_pretrained_model(cls, model: "HypeNetForCausalLM", *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but the embedding never replaces another head.

        Raises:
            ValueError: the configuration ties the head, and the checkpoint has another one.
        """
        loaded = super()._load_pretrained_model(model, *args, **kwargs)
        head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
        if not model.config.tie_word_embeddings:
            return loaded
        # transformers 4 returns its lists, 5 a record of them.
        record = loaded[0] if isinstance(loaded, tuple) else loaded
        mismatched = loaded[3] if record is model else record.mismatched_keys
        if any("lm_head.weight" in key for key in mismatched):  # of another shape: the embedding is made anew
            if record is not model:
                record.missing_keys.add("lm_head.weight")
        elif head.is_meta or embedding.is_meta:
            return loaded
        elif not torch.equal(head, embedding):
            raise ValueError(
                "The checkpoint's lm_head.weight is not its embedding, but its configuration ties the two: "
                "set tie_word_embeddings to false."
            )
        model.lm_head.weight = embedding  # transformers 5.0 to 5.2 leave two that the checkpoint has both
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: HypeNetCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Qwen3ForCausalLM's, but in training labels give a loss without logits.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: as `HypeNetModel`
                has them.
            labels: [B, T]: the input tokens, -100 where one is no target. The first token of a packed document is
                none. In training, `logits` is None then. It is returned too, as in evaluation, if the configuration's
                `logits_in_training` or `logits_to_keep` is set, or the loss or the head is not the model's own
                (`loss_function`, an adapter).
            logits_to_keep: the number of last tokens, or their indices, to compute logits of. 0: all.
            kwargs: those of `HypeNetModel` and of transformers' loss, e.g. `num_items_in_batch`.
        """
        cache = the_cache(past_key_values, cache)
        kwargs = known_arguments(kwargs)
        every_logit = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and cache is None:
            bounds = documents(position_ids, kwargs.get("cu_seq_lens_q"), attention_mask, *labels.shape)
            if bounds is not None:
                kwargs["cu_seq_lens_q"] = bounds
                first = bounds[:-1].to(labels.device, torch.long)
                labels = labels.flatten().index_fill(0, first, kwargs.get("ignore_index", IGNORE)).view_as(labels)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        own = type(self.lm_head) is nn.Linear and self.loss_function is ForCausalLMLoss
        wanted = not self.training or self.config.logits_in_training or not every_logit
        if labels is None or wanted or not own:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        outputs = self.model(**inputs)
        return CausalLMOutputWithPast(
            loss=next_token_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **kwargs),
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Let `generate` begin with the hybrid cache.

        Raises:
            ValueError: `cache_implementation` asks for another one.
        """
        if generation_config.cache_implementation not in (None, "dynamic"):  # it grows, as the dynamic one does
            raise ValueError("HypeNet has one cache, HypeNetCache: leave cache_implementation unset, or 'dynamic'.")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = HypeNetCache(self.config)

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As for any model, but `forward` counts the positions, from the mask.

        transformers 4 counts padding too when it prefills in chunks. This must name `inputs_embeds`: else transformers
        does not generate from them.
        """
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)
        return inputs
