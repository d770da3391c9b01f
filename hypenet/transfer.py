"""From a teacher's attention to HypeNet: HALO's initialisation (paper Sec. 4.1 and 5.2). Nothing here trains.

What is not in the teacher (the gates, the output norm, a mixer's own parameters) starts as in any new HypeNet: weight
matrices drawn from N(0, initializer_range^2), biases at zero, norms at one, the rest as the mixer's constructor has it.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .configuration_hypenet import ATTENTION, LIGHTNING, HypeNetConfig
from .mixers import build_mixer
from .modeling_hypenet import HypeNetDecoderLayer, HypeNetForCausalLM, HypeNetRotaryEmbedding

TEACHERS = ("llama", "mistral", "qwen2", "qwen3")
"""The model types that can be converted."""

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
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
)
"""What a teacher's configuration and HypeNet's call by the same name, in either version of transformers."""

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

    Biases are where the teacher has them, and QK-norm in attention layers if it has it there. RNN layers have QK-norm
    whatever the teacher has (Sec. 5.2). A teacher's sliding window is not taken over: the attention layers that are
    kept see the whole context.

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

    family, teacher = teacher_config.model_type, teacher_config.to_dict()
    all_biases = family in ("llama", "qwen3") and teacher_config.attention_bias
    keys: dict[str, Any] = {name: teacher[name] for name in _SAME_KEYS if name in teacher}
    keys |= {
        "head_dim": _head_dim(teacher_config),
        "mixer_types": [ATTENTION if i in attention_layers else rnn_mixer for i in range(layers)],
        "attn_use_qk_norm": family == "qwen3",
        "attn_qkv_bias": all_biases or family == "qwen2",
        "attn_o_bias": all_biases,
        "attn_logits_scaling": logits_scaling,
    }
    return HypeNetConfig(**(keys | switches))


def _check_teacher(config: PretrainedConfig) -> None:
    if config.model_type not in TEACHERS:
        raise ValueError(f"The teacher is a {config.model_type!r}; supported: {', '.join(TEACHERS)}.")
    if getattr(config, "mlp_bias", False):
        raise ValueError("The teacher's MLPs have biases (mlp_bias), and HypeNet's have none.")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"The teacher's {heads} heads are no multiple of its {kv_heads} key and value heads.")
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ValueError(f"The teacher's hidden_size {config.hidden_size} is no multiple of its {heads} heads.")


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mixer_from_attention(attention: nn.Module, config: HypeNetConfig, layer_idx: int) -> nn.Module:
    """A new mixer for layer `layer_idx` with the projections, their biases and the q/k norms of `attention`.

    Key and value heads are cloned where the mixer has more of them: head i takes the weights of head floor(i/g)
    (Eq. 13). The q/k norms of `attention` stay behind where the mixer has none. The mixer has the dtype and device of
    `attention`, and shares no memory with it.

    Raises:
        ValueError: the layer keeps its attention in `config`, or a weight has no place in the mixer, or the heads of
            the two do not fit, or `attention` scales its logits by something other than 1/sqrt(D).
    """
    if config.mixer_types[layer_idx] == ATTENTION:
        raise ValueError(f"Layer {layer_idx} is an attention layer in this configuration: there is no RNN to make.")
    mixer = _new_mixer(config, layer_idx, like=attention.get_parameter("q_proj.weight"))
    mixer.load_state_dict(_inherited(attention, mixer, layer_idx), strict=False)
    return mixer


def _new_mixer(config: HypeNetConfig, layer_idx: int, *, like: Tensor) -> nn.Module:
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
    """The weights of `attention` that `mixer` takes, by the mixer's names and in its shapes."""
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
    """A hybrid without weights: its parameters, of `dtype`, are on the meta device. RoPE's frequencies are made."""
    with torch.device("meta"):
        hybrid = HypeNetForCausalLM(config).to(dtype)
    hybrid.model.rotary_emb = HypeNetRotaryEmbedding(config, device=device)
    return hybrid


def layer_from_teacher(
    layer: nn.Module, config: HypeNetConfig, layer_idx: int, rnn_mixer: Mapping[str, Tensor] | None = None
) -> HypeNetDecoderLayer:
    """The hybrid's layer `layer_idx`, in the dtype and on the device of the teacher's, `layer`.

    It takes over the teacher's weights, and those of `rnn_mixer` where they are of that dtype: they share memory.

    Args:
        layer: a decoder layer of a teacher. With `rnn_mixer`, its attention is not read, and may be on the meta device.
        rnn_mixer: the state dict of the RNN mixer, as stage 1 trained it. None: the mixer, RNN or attention, is
            converted from the teacher's attention.

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
        rnn_mixers: the state dicts of RNN mixers by layer, as stage 1 trained them. An RNN layer without one is
            converted from the teacher's attention; those of layers that keep attention are not used.

    Returns:
        A model that shares no memory with the teacher, training or evaluating as the teacher does.

    Raises:
        ValueError: a weight is missing or has no place, or the head is tied in one model and not in the other.
        RuntimeError: a weight has another shape than in `config`.
    """
    if config.tie_word_embeddings != teacher.config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be as in the teacher: its head is not to be lost.")
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
    hybrid.generation_config = copy.deepcopy(teacher.generation_config)
    return hybrid.train(teacher.training)
