"""Export: a Hugging Face folder that carries the model's code and so loads where this project is not installed."""

import copy
import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from .configuration_hypenet import ATTENTION, HypeNetConfig, read_scaling
from .modeling_hypenet import HypeNetForCausalLM, HypeNetModel
from .rope import installed_rope

LENGTH = 1_048_576
"""The tokens that a hybrid without RoPE in its attention says it reads, as the published configurations do."""

_NO_LENGTH = 20
"""transformers' `max_length` where a model states none."""


def supported_length(config: HypeNetConfig, trained: int) -> int:
    """The length, in tokens, that a hybrid states as its own: tools cut longer prompts without a word.

    States and NoPE attention have no longest length. RoPE in attention layers has: what the teacher or the hybrid was
    trained on.

    Args:
        trained: the tokens of the longest sequence that the hybrid was trained on.
    """
    known = max(config.max_position_embeddings, trained)
    return known if config.attn_use_rope and ATTENTION in config.mixer_types else max(known, LENGTH)


def export_pretrained(
    model: HypeNetForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    logits_scaling: str | float | None,
    trained_length: int = 0,
) -> None:
    """Write `model` with `tokenizer` to `folder`: configuration, safetensors, tokenizer and model code.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it anywhere, and `AutoModel` loads it
    without its head. Configuration, tokenizer and generation state the `supported_length`, and not the teacher's; the
    model and the tokenizer keep their own.

    Args:
        logits_scaling: the `attn_logits_scaling` to write, e.g. `hype_scaling(500)`. The model keeps its own.
        trained_length: the tokens of the longest sequence that `model` was trained on.

    Raises:
        ValueError: `logits_scaling` is none that there is.
    """
    if logits_scaling is not None:
        read_scaling(logits_scaling)
    before, generation, longest = model.config.__dict__.copy(), model.generation_config, tokenizer.model_max_length
    length = supported_length(model.config, trained_length)
    model.generation_config = copy.deepcopy(generation)
    if (generation.max_length or 0) > _NO_LENGTH:
        model.generation_config.max_length = max(length, generation.max_length)
    tokenizer.model_max_length = max(length, longest)
    # From here on, RoPE's original length does not follow from `max_position_embeddings`: it is stated.
    model.config.__dict__.update(installed_rope(before))
    model.config.max_position_embeddings = length
    model.config.attn_logits_scaling = logits_scaling
    classes: dict[Any, tuple[str, ...]] = {HypeNetConfig: (), HypeNetForCausalLM: ("AutoModelForCausalLM",)}
    # transformers adds the class that it saves; the decoder without its head is in the same folder.
    model.config.auto_map = {"AutoModel": f"{HypeNetModel.__module__.rpartition('.')[2]}.{HypeNetModel.__name__}"}
    try:
        for cls, name in classes.items():
            cls.register_for_auto_class(*name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:  # later, models are saved without their code again
        for cls in classes:
            cls._auto_class = None
        model.config.__dict__.clear()
        model.config.__dict__.update(before)
        model.generation_config, tokenizer.model_max_length = generation, longest
