"""From a teacher's attention to HypeNet: HALO's initialisation (paper Sec. 4.1 and 5.2). Nothing here trains.

What is not in the teacher (the gates, the output norm) starts as in any new HypeNet: weight matrices drawn from
N(0, initializer_range^2), norms at one.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_hypenet import ATTENTION, HypeNetConfig
from .mixers import build_mixer
from .modeling_hypenet import HypeNetForCausalLM


def hybrid_config(
    teacher_config: Qwen3Config,
    attention_layers: Sequence[int],
    *,
    rnn_mixer: str = "lightning-attn",
    logits_scaling: str | float | None = None,
) -> HypeNetConfig:
    """The configuration of the hybrid that keeps attention in `attention_layers` (0-based) and nowhere else.

    Args:
        logits_scaling: the configuration's `attn_logits_scaling`.

    Raises:
        ValueError: the teacher is no Qwen3, or a layer is listed twice or does not exist.
    """
    if teacher_config.model_type != "qwen3":
        raise ValueError(f"The teacher must be of the Qwen3 architecture, not {teacher_config.model_type!r}.")
    layers = teacher_config.num_hidden_layers
    if len(set(attention_layers)) != len(attention_layers) or not set(attention_layers) <= set(range(layers)):
        raise ValueError(f"attention_layers must be distinct, from 0 to {layers - 1}, not {list(attention_layers)}.")
    teacher = teacher_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        teacher.pop(name, None)
    return HypeNetConfig(
        mixer_types=[ATTENTION if i in attention_layers else rnn_mixer for i in range(layers)],
        attn_logits_scaling=logits_scaling,
        **teacher,
    )


def mixer_from_attention(attention: Qwen3Attention, config: HypeNetConfig, layer_idx: int) -> nn.Module:
    """A new RNN mixer for layer `layer_idx` with the projections and q/k norms of `attention`.

    Key and value heads are cloned where the mixer has more of them: head i takes the weights of head floor(i/g)
    (Eq. 13). The mixer has the dtype and device of `attention`, and shares no memory with it.

    Raises:
        ValueError: the layer keeps its attention in `config`, or the heads of the two do not fit.
    """
    if config.mixer_types[layer_idx] == ATTENTION:
        raise ValueError(f"Layer {layer_idx} is an attention layer in this configuration: there is no RNN to make.")
    weight = attention.q_proj.weight
    with torch.device(weight.device):
        mixer = build_mixer(config, layer_idx).to(weight.dtype)
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)

    inherited = attention.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        inherited[name] = _clone_heads(inherited[name], attention.head_dim, config.lightning_nkv)
    own = mixer.state_dict()
    misfit = [name for name, value in inherited.items() if name in own and own[name].shape != value.shape]
    if misfit:
        raise ValueError(f"Layer {layer_idx}: the teacher's {', '.join(misfit)} do not fit the RNN mixer's heads.")
    mixer.load_state_dict({name: value for name, value in inherited.items() if name in own}, strict=False)
    return mixer


def _clone_heads(weight: Tensor, head_dim: int, heads: int) -> Tensor:
    """Eq. 13: [kv_heads * D, hidden] -> [heads * D, hidden], each head cloned heads / kv_heads times in place."""
    by_head = weight.unflatten(0, (-1, head_dim))
    return by_head.repeat_interleave(heads // by_head.shape[0], dim=0).flatten(0, 1)


def hybrid_from_teacher(
    teacher: Qwen3ForCausalLM,
    config: HypeNetConfig,
    rnn_mixers: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> HypeNetForCausalLM:
    """The hybrid of `config` with the weights of `teacher`, in its dtype and on its device.

    Args:
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
    weights = dict(teacher.state_dict())
    fresh = set()
    for i, mixer_type in enumerate(config.mixer_types):
        prefix = f"model.layers.{i}.self_attn."
        if mixer_type == ATTENTION:
            fresh.add(f"{prefix}o_gate.weight")
            continue
        attention = teacher.model.layers[i].self_attn
        mixer = rnn_mixers[i] if i in rnn_mixers else mixer_from_attention(attention, config, i).state_dict()
        for name in attention.state_dict():
            del weights[prefix + name]
        weights.update({prefix + name: value for name, value in mixer.items()})

    with torch.device(teacher.device):
        hybrid = HypeNetForCausalLM(config).to(teacher.dtype)
    missing, unexpected = hybrid.load_state_dict(weights, strict=False)
    if unexpected or not fresh.issuperset(missing):
        raise ValueError(f"The weights do not fit: {', '.join([*unexpected, *sorted(set(missing) - fresh)])}.")
    hybrid.generation_config = copy.deepcopy(teacher.generation_config)
    return hybrid.train(teacher.training)
