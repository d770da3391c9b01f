"""Export: a Hugging Face folder that carries the model's code and so loads where this project is not installed."""

import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from .configuration_hypenet import HypeNetConfig, read_scaling
from .modeling_hypenet import HypeNetForCausalLM, HypeNetModel


def export_pretrained(
    model: HypeNetForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    logits_scaling: str | float | None,
) -> None:
    """Write `model` with `tokenizer` to `folder`: configuration, safetensors, tokenizer and model code.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it anywhere, and `AutoModel` loads it
    without its head.

    Args:
        logits_scaling: the `attn_logits_scaling` to write, e.g. `hype_scaling(500)`. The model keeps its own.

    Raises:
        ValueError: `logits_scaling` is none that there is.
    """
    if logits_scaling is not None:
        read_scaling(logits_scaling)
    before = model.config.__dict__.copy()
    model.config.attn_logits_scaling = logits_scaling
    classes: dict[Any, tuple[str, ...]] = {HypeNetConfig: (), HypeNetForCausalLM: ("AutoModelForCausalLM",)}
    # transformers adds the class that it saves; the decoder without its head is in the same folder.
    model.config.auto_map = {"AutoModel": f"{HypeNetModel.__module__.rpartition('.')[2]}.{HypeNetModel.__name__}"}
    try:
        for cls, name in classes.items():
            cls.register_for_auto_class(*name)
        model.save_pretrained(folder)
    finally:  # later, models are saved without their code again
        for cls in classes:
            cls._auto_class = None
        model.config.__dict__.clear()
        model.config.__dict__.update(before)
    tokenizer.save_pretrained(folder)
