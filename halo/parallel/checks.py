"""Whether ranks can share the sequences of a stage: found out before anything is loaded."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from halo.config import Config
from halo.errors import UserError
from halo.models.families import window_of
from halo.models.loading import load_model_config
from halo.parallel.exchanges import can_be_split
from hypenet.mixers import build_mixer
from hypenet.rope import ROPE_BY_LENGTH
from hypenet.transfer import hybrid_config, rope_type


def check_sequence_parallel(teacher: Path, config: Config, stage: str, ranks: int) -> None:
    """Whether the ranks can share the sequences of a stage with its settings, found out without weights.

    Raises:
        UserError: naming what does not fit, and what would.
    """
    settings, shape = getattr(config, stage), load_model_config(teacher)
    degree, name = settings.sequence_parallel, f"{stage}.sequence_parallel"
    if degree == 1:
        return
    with torch.device("meta"):
        mixers = [
            build_mixer(hybrid_config(shape, kept, rnn_mixer=config.rnn_mixer, **config.architecture.switches()), 0)
            for kept in ([], [0])
        ]
        layers = AutoModelForCausalLM.from_config(shape).model.layers
    lengths = getattr(settings, "lengths", None) or (settings.seq_len,)
    longest = max(lengths)
    cut = [length for length in lengths if length % degree] if stage != "niah" else []  # needles are padded
    length = cut[0] if cut else 0
    check_degree(name, degree, seq_len=length, ranks=ranks, mixers=mixers)
    rope = rope_type(shape)
    if rope in ROPE_BY_LENGTH:
        raise UserError(f"{name} = {degree}: RoPE of type {rope} depends on the length of a rank's part: set it to 1")
    windows = [window_of(layer.self_attn) for layer in layers] if stage not in ("finetune", "scaling") else []
    if any(window is not None and window < longest for window in windows):
        raise UserError(
            f"{name} = {degree}: the teacher has layers that see fewer tokens than a sequence of {longest}: set it to 1"
        )


def check_degree(name: str, degree: int, *, seq_len: int, ranks: int, mixers: Iterable[nn.Module]) -> None:
    """Whether `degree` of `ranks` can share sequences of `seq_len` tokens.

    Args:
        name: the setting's name, for the error.
        mixers: one of each kind in the model, on any device.

    Raises:
        UserError: naming what does not fit, and the nearest degrees that do.
    """
    if degree == 1:
        return
    sizes = {f"the {ranks} ranks": ranks, f"a sequence of {seq_len} tokens": seq_len}
    for mixer in mixers:
        if not can_be_split(mixer):
            raise UserError(f"{name} = {degree}: {type(mixer).__name__} cannot be split over ranks: set it to 1")
        if heads := shared_heads(mixer):
            sizes[f"the {heads} heads of {type(mixer).__name__}"] = heads
    for words, size in sizes.items():
        if size % degree:
            common = math.gcd(*sizes.values())
            fit = [d for d in range(1, common + 1) if common % d == 0]
            near = [max(d for d in fit if d < degree), *(d for d in fit if d > degree)][:2]
            raise UserError(f"{name} = {degree} does not divide {words}: use {' or '.join(map(str, near))}")


def shared_heads(mixer: Any) -> int | None:
    """The number of heads that are split over the ranks of a group, or None: the mixer exchanges states."""
    return None if mixer.split == "states" else mixer.heads
