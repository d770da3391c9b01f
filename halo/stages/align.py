"""Stage 1: each RNN layer starts from its attention layer's weights and learns to give the same output (Eq. 7).

Writes `mixers.safetensors`: every layer's RNN mixer, keys `<layer>.<parameter>`, and nothing of the teacher.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.context import Context
from halo.data.stage_shards import check_data, shards_for
from halo.distributed import on_rank0
from halo.models.attention import PLAIN
from halo.models.attention_functions import registered, use_attention
from halo.models.build import build_mixers, build_teacher
from halo.parallel.sequence import SequenceGroup
from halo.run import StageFolder
from halo.teacher.colocated import Teacher
from halo.training.engine import placement
from halo.training.objectives import Alignment
from halo.training.trainer import train
from hypenet.transfer import hybrid_config, mixer_from_attention

MIXERS_FILE = "mixers.safetensors"


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_data`.
    """
    check_data(context, "align")


def run(context: Context) -> None:
    folder, training = context.folder("align"), context.config.align
    shards = shards_for(context, "align")
    attention = context.attention["align"]
    teacher = use_attention(build_teacher(context.teacher), attention["teacher"])
    switches = context.config.architecture.switches()
    config = hybrid_config(teacher.config, attention_layers=[], rnn_mixer=context.config.rnn_mixer, **switches)
    torch.manual_seed(training.seed)
    config._attn_implementation = registered(attention["student"])
    mixers = build_mixers(context.teacher, config, placement(context.ds_config, training))
    objective = Alignment(mixers, Teacher(teacher, sequence=SequenceGroup(training.sequence_parallel)))
    result = train(objective, training, shards=shards, folder=folder, ds_config=context.ds_config)

    def finish() -> None:
        folder.save_tensors(MIXERS_FILE, {name.removeprefix("mixers."): w for name, w in result.weights.items()})
        folder.complete([MIXERS_FILE], result.summary())

    on_rank0(finish)


def new_mixers(
    teacher: PreTrainedModel, rnn_mixer: str, *, attention: str = PLAIN, **switches: Any
) -> dict[int, nn.Module]:
    """An RNN mixer for every attention layer of the teacher, initialised from its weights (Sec. 4.1).

    Args:
        attention: the implementation of softmax attention, where the mixer has some.
        switches: those of `hybrid_config`.

    Returns:
        Layer index -> mixer, in the teacher's dtype and on its device.
    """
    config = hybrid_config(teacher.config, attention_layers=[], rnn_mixer=rnn_mixer, **switches)
    config._attn_implementation = registered(attention)
    return {
        index: mixer_from_attention(layer.self_attn, config, index).to(teacher.dtype)
        for index, layer in enumerate(teacher.model.layers)
    }


def load_mixers(folder: StageFolder) -> Mapping[int, dict[str, Tensor]]:
    """Stage 1's result: layer index -> that mixer's state dict."""
    mixers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in folder.load_tensors(MIXERS_FILE).items():
        layer, _, parameter = name.partition(".")
        mixers.setdefault(int(layer), {})[parameter] = tensor
    return mixers
