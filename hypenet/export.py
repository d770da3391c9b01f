"""Export: a Hugging Face folder that carries the model's code and so loads where this project is not installed."""

import os

from transformers import PreTrainedTokenizerBase

from .configuration_hypenet import HypeNetConfig
from .modeling_hypenet import HypeNetForCausalLM


def export_pretrained(
    model: HypeNetForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    logits_scaling: str | float | None,
) -> None:
    """Write `model` with `tokenizer` to `folder`: configuration, safetensors, tokenizer and model code.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it anywhere.

    Args:
        logits_scaling: the `attn_logits_scaling` to write, e.g. `hype_scaling(500)`. The model keeps its own.
    """
    HypeNetConfig.register_for_auto_class()
    HypeNetForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    before = model.config.attn_logits_scaling
    model.config.attn_logits_scaling = logits_scaling
    try:
        model.save_pretrained(folder)
    finally:
        model.config.attn_logits_scaling = before
    tokenizer.save_pretrained(folder)
