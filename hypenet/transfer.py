"""From a teacher's attention to HypeNet: HALO's initialisation (paper Sec. 4.1 and 5.2). Nothing here trains.

What the teacher does not have (the gates, the output norm, a mixer's own parameters) starts as in any new HypeNet:
weight matrices drawn from N(0, initializer_range^2), biases at zero, norms at one, the rest as the mixer's constructor
sets it.
"""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .configuration_hypenet import ATTENTION, LIGHTNING, HypeNetConfig
from .mixers import Mixer, build_mixer
from .modeling_hypenet import HypeNetDecoderLayer, HypeNetForCausalLM, HypeNetRotaryEmbedding
from .rope import ORIGINAL, ROPE_TYPES, is_misread, read_rope


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of teachers has in attention, and what transformers reads of it.

    Attributes:
        qkv_biases, o_biases: biases of the projections. None: as the configuration's `attention_bias` says.
        qk_norm: QK-norm.
        window: where transformers keeps a sliding window: in each attention layer, or in the configuration, for all
            layers. None: the family has none.
        rope_types: the variants of RoPE.
        gguf_biases: whether transformers reads biases from a GGUF file. If not, it drops them.
    """

    qkv_biases: bool | None
    o_biases: bool | None
    qk_norm: bool
    window: Literal["layer", "config"] | None
    rope_types: tuple[str, ...] = ROPE_TYPES
    gguf_biases: bool


FAMILIES = {
    "llama": Family(qkv_biases=None, o_biases=None, qk_norm=False, window=None, gguf_biases=False),
    "mistral": Family(qkv_biases=False, o_biases=False, qk_norm=False, window="config", gguf_biases=False),
    "qwen2": Family(qkv_biases=True, o_biases=False, qk_norm=False, window="layer", gguf_biases=True),
    "qwen3": Family(qkv_biases=None, o_biases=None, qk_norm=True, window="layer", gguf_biases=False),
}
"""The teachers that can be converted, by model type. A new one is a record here, and in the tests' FAMILIES."""
TEACHERS = tuple(FAMILIES)

_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The keys of a teacher's configuration that HypeNet takes over, in either version of transformers."""

_SWITCHES = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False, "use_cache": True}
"""The generation settings that give others their effect, and what they are where they are not set."""

_QK_NORMS = ("q_norm.weight", "k_norm.weight")


def hybrid_config(
    teacher_config: PretrainedConfig,
    attention_layers: Sequence[int],
    *,
    rnn_mixer: str = LIGHTNING,
    logits_scaling: str | float | None = None,
    **switches: Any,
) -> HypeNetConfig:
    """The configuration of the hybrid that keeps attention in `attention_layers` (0-based) and nowhere else.

    The projections have the teacher's biases, and attention layers its QK-norm. RNN layers always have QK-norm (Sec.
    5.2). A teacher's sliding window is dropped: the attention layers that are kept see the whole context.

    Args:
        teacher_config: of a model type in `TEACHERS`.
        logits_scaling: the configuration's `attn_logits_scaling`.
        switches: other keys of `HypeNetConfig`, e.g. `attn_use_rope` or `expand_kv_proj`.

    Raises:
        ValueError: HypeNet cannot represent the teacher, a layer is listed twice or does not exist, or there is no
            such switch.
    """
    _check_teacher(teacher_config)
    layers = teacher_config.num_hidden_layers
    if len(set(attention_layers)) != len(attention_layers) or not set(attention_layers) <= set(range(layers)):
        raise ValueError(f"attention_layers must be distinct, from 0 to {layers - 1}, not {list(attention_layers)}.")
    known = inspect.signature(HypeNetConfig.__init__).parameters.keys() - {"self", "kwargs", "mixer_types"}
    if unknown := switches.keys() - known:
        raise ValueError(f"HypeNetConfig has no {', '.join(sorted(unknown))}.")

    family, teacher = FAMILIES[teacher_config.model_type], teacher_config.to_dict()
    keys: dict[str, Any] = {name: teacher[name] for name in _SAME_KEYS if name in teacher}
    rope = read_rope(teacher)
    if rope["rope_type"] == "dynamic":
        rope[ORIGINAL] = teacher_config.max_position_embeddings  # all that transformers looks at
    keys |= {
        "head_dim": _head_dim(teacher_config),
        "mixer_types": [ATTENTION if i in attention_layers else rnn_mixer for i in range(layers)],
        "attn_use_qk_norm": family.qk_norm,
        "attn_qkv_bias": teacher_config.attention_bias if family.qkv_biases is None else family.qkv_biases,
        "attn_o_bias": teacher_config.attention_bias if family.o_biases is None else family.o_biases,
        "attn_logits_scaling": logits_scaling,
        "rope_parameters": rope,
    }
    return HypeNetConfig(**(keys | switches))


def _check_teacher(config: PretrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(f"The teacher is a {config.model_type!r}; supported: {', '.join(TEACHERS)}.")
    if rope_type(config) not in FAMILIES[config.model_type].rope_types:
        raise ValueError(f"The teacher's RoPE is of type {rope_type(config)!r}; supported: {', '.join(ROPE_TYPES)}.")
    if is_misread(config):
        raise ValueError(
            "The installed transformers does not read all of the teacher's RoPE: make its configuration from "
            "hypenet.rope.installed_rope of its keys."
        )
    if getattr(config, "mlp_bias", False):
        raise ValueError("The teacher's MLPs have biases (mlp_bias), and HypeNet's have none.")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"The teacher's {heads} heads are no multiple of its {kv_heads} key and value heads.")
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ValueError(f"The teacher's hidden_size {config.hidden_size} is no multiple of its {heads} heads.")


def rope_type(config: PretrainedConfig) -> str:
    """The variant of RoPE in a teacher's configuration, in either version of transformers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mixer_from_attention(attention: nn.Module, config: HypeNetConfig, layer_idx: int) -> nn.Module:
    """A new mixer for layer `layer_idx` with the projections, their biases and the q/k norms of `attention`.

    If the mixer has more key and value heads, they are cloned: head i gets the weights of head floor(i/g) (Eq. 13). A
    mixer without QK-norm does not get the q/k norms. It has the dtype and device of `attention`, and shares no memory
    with it.

    Raises:
        ValueError: the layer keeps its attention in `config`, or the mixer has no place for a weight, or the heads of
            the two do not fit, or `attention` scales its logits by something other than 1/sqrt(D).
    """
    if config.mixer_types[layer_idx] == ATTENTION:
        raise ValueError(f"Layer {layer_idx} is an attention layer in this configuration: there is no RNN to make.")
    mixer = _new_mixer(config, layer_idx, like=attention.get_parameter("q_proj.weight"))
    mixer.load_state_dict(_inherited(attention, mixer, layer_idx), strict=False)
    return mixer


def _new_mixer(config: HypeNetConfig, layer_idx: int, *, like: Tensor) -> Mixer:
    """A mixer as in any new HypeNet, with the dtype and device of `like`."""
    with torch.device(like.device):
        mixer = build_mixer(config, layer_idx).to(like.dtype)
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return mixer


def _inherited(attention: Any, mixer: Any, layer_idx: int) -> dict[str, Tensor]:
    """The weights of `attention` that `mixer` inherits, with the mixer's names and shapes."""
    if attention.scaling != attention.head_dim**-0.5:
        raise ValueError(
            f"Layer {layer_idx}: the teacher scales its logits by {attention.scaling:g}, "
            f"HypeNet by 1/sqrt({attention.head_dim})."
        )
    if mixer.head_dim != attention.head_dim:
        raise ValueError(
            f"Layer {layer_idx}: the teacher's heads are {attention.head_dim} wide, the mixer's {mixer.head_dim}."
        )
    own = {name: weight.shape for name, weight in mixer.state_dict().items()}
    taken: dict[str, Tensor] = attention.state_dict()
    for name in [name for name in _QK_NORMS if name not in own]:
        taken.pop(name, None)
    for name in taken.keys() & own.keys():
        if name.startswith(("k_proj", "v_proj")):
            taken[name] = _clone_heads(taken[name], attention.head_dim, own[name][0] // attention.head_dim)
    if misfit := [name for name, weight in taken.items() if own.get(name) != weight.shape]:
        raise ValueError(f"Layer {layer_idx}: the teacher's {', '.join(misfit)} do not fit the mixer.")
    return taken


def _clone_heads(weight: Tensor, head_dim: int, heads: int) -> Tensor:
    """Eq. 13: [kv_heads * D, ...] -> [heads * D, ...], each head cloned heads / kv_heads times in place."""
    by_head = weight.unflatten(0, (-1, head_dim))
    return by_head.repeat_interleave(heads // by_head.shape[0], dim=0).flatten(0, 1)


def empty_hybrid(config: HypeNetConfig, *, dtype: torch.dtype, device: torch.device) -> HypeNetForCausalLM:
    """A hybrid without weights: its parameters, of `dtype`, are on the meta device. RoPE's frequencies have values."""
    with torch.device("meta"):
        hybrid = HypeNetForCausalLM(config).to(dtype)
    with device:
        hybrid.model.rotary_emb = HypeNetRotaryEmbedding(config)
    return hybrid


def layer_from_teacher(
    layer: nn.Module, config: HypeNetConfig, layer_idx: int, rnn_mixer: Mapping[str, Tensor] | None = None
) -> HypeNetDecoderLayer:
    """The hybrid's layer `layer_idx`, in the dtype and on the device of the teacher's, `layer`.

    It shares memory with the teacher's weights, and with those of `rnn_mixer` that have its dtype.

    Args:
        layer: a decoder layer of a teacher. With `rnn_mixer`, its attention is not read, and may be on the meta device.
        rnn_mixer: the state dict of the RNN mixer that stage 1 trained. None: the mixer, RNN or attention, is converted
            from the teacher's attention.

    Raises:
        ValueError: a weight is missing or has no place.
        RuntimeError: a weight has another shape than in `config`.
    """
    weights = {name: value for name, value in layer.state_dict().items() if not name.startswith("self_attn.")}
    like = layer.get_parameter("input_layernorm.weight")
    with torch.device("meta"):
        made = HypeNetDecoderLayer(config, layer_idx)
    made.self_attn = mixer = _new_mixer(config, layer_idx, like=like)
    if rnn_mixer is None:
        rnn_mixer = mixer.state_dict() | _inherited(layer.get_submodule("self_attn"), mixer, layer_idx)
    weights |= {f"self_attn.{name}": value.to(like) for name, value in rnn_mixer.items()}
    missing, unexpected = made.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        misfit = [f"model.layers.{layer_idx}.{name}" for name in [*unexpected, *sorted(missing)]]
        raise ValueError(f"The weights do not fit: {', '.join(misfit)}.")
    return made


def hybrid_from_teacher(
    teacher: PreTrainedModel,
    config: HypeNetConfig,
    rnn_mixers: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> HypeNetForCausalLM:
    """The hybrid of `config` with the weights of `teacher`, in its dtype and on its device.

    Args:
        teacher: of a model type in `TEACHERS`, with its head.
        rnn_mixers: the state dicts of the RNN mixers that stage 1 trained, by layer. An RNN layer without one is
            converted from the teacher's attention; those of layers that keep attention are not used.

    Returns:
        A model that shares no memory with the teacher, in training mode if the teacher is.

    Raises:
        ValueError: a weight is missing or has no place, or the head is tied in one model and not in the other.
        RuntimeError: a weight has another shape than in `config`.
    """
    if config.tie_word_embeddings != teacher.config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be as in the teacher: else its head would be lost.")
    rnn_mixers = rnn_mixers or {}
    hybrid = empty_hybrid(config, dtype=teacher.dtype, device=teacher.device)
    for i, layer in enumerate(teacher.model.layers):
        trained = copy.deepcopy(rnn_mixers.get(i)) if config.mixer_types[i] != ATTENTION else None
        hybrid.model.layers[i] = layer_from_teacher(copy.deepcopy(layer), config, i, trained)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        weights = {key: value.clone() for key, value in teacher.get_submodule(name).state_dict().items()}
        hybrid.get_submodule(name).load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        hybrid.lm_head.weight = hybrid.model.embed_tokens.weight
    hybrid.generation_config, unset = savable_generation(teacher.generation_config)
    if unset:
        left_out = "The teacher's generation settings %s have no effect, and are left out."
        logging.getLogger(__name__).warning(left_out, ", ".join(unset))
    return hybrid.train(teacher.training)


def savable_generation(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """A copy of a generation configuration that transformers saves, and the names of the settings that it lost.

    transformers reads settings that another one switches off, such as a temperature without `do_sample`, and refuses
    to save them. They have no effect, and are set to their defaults. `do_sample` and `num_beams` count as False and 1
    where they are None, as transformers 5 reads them and 4 does not: a later version can save the copy, too.

    Raises:
        ValueError: a value is not valid.
    """
    config.validate()
    default, alone, unset = GenerationConfig(), GenerationConfig(), list[str]()
    for name, otherwise in _SWITCHES.items():
        value = getattr(config, name)
        setattr(alone, name, otherwise if value is None else value)
    for name, value in config.__dict__.items():
        if name in _SWITCHES or name.startswith("_"):
            continue
        setattr(alone, name, value)
        try:
            alone.validate(strict=True)
        except ValueError:
            setattr(alone, name, getattr(default, name, None))
            unset.append(name)
    savable = copy.deepcopy(config)
    for name in unset:
        setattr(savable, name, getattr(default, name, None))
    savable.validate(strict=True)
    return savable, unset
