"""Loading the models that stages pass on: the teacher, and the hybrid."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halo.errors import UserError
from halo.tokenizer import load_tokenizer
from hypenet import HypeNetForCausalLM

TEACHER_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
SUPPORTED = ("qwen3",)
"""Model types whose attention layers hypenet.transfer can convert."""


def training_dtype() -> torch.dtype:
    """bfloat16 on a GPU (Appendix B), float32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def find_teacher(name: str) -> Path:
    """The local folder of a teacher, downloaded first if `name` is a hub id. Checks it without loading it.

    Raises:
        UserError: no such model; no causal language model; a tokenizer larger than the embedding.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=TEACHER_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"no teacher at '{name}': neither a folder nor a model on the hub that can be reached"
            ) from error
    _check_teacher(folder)
    return folder


def _check_teacher(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"the teacher's folder {folder} has no config.json: name a Hugging Face model folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    architectures = config.get("architectures") or ["none named"]
    if not architectures[0].endswith("ForCausalLM"):
        raise UserError(f"the teacher at {folder} is no causal language model (its architecture is {architectures[0]})")
    if config.get("model_type") not in SUPPORTED:
        raise UserError(f"the teacher at {folder} is a '{config.get('model_type')}'; supported: {', '.join(SUPPORTED)}")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"the teacher's folder {folder} has no .safetensors weights")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config["vocab_size"]:
        raise UserError(
            f"the tokenizer at {folder} has {len(tokenizer)} tokens, more than the teacher's embedding "
            f"({config['vocab_size']}): use the teacher's own tokenizer"
        )


def unpadded(input_ids: Tensor) -> dict[str, Any]:
    """The arguments of one forward of full rows [B, T], without a cache.

    Without the mask of ones, transformers 4 builds one of [T, T] for Qwen3.
    """
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}


def load_teacher(folder: Path) -> PreTrainedModel:
    """The teacher in training precision, on the CPU."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=training_dtype())
    except Exception as error:
        raise UserError(f"the teacher at {folder} cannot be loaded: {_first_line(error)}") from error


def load_hybrid(folder: Path) -> HypeNetForCausalLM:
    return HypeNetForCausalLM.from_pretrained(folder, dtype=training_dtype())


def apply_yarn(teacher: PreTrainedModel, length: int, original: int) -> None:
    """Stretch a teacher's RoPE from `original` to `length` with YaRN; a length of at most `original` takes it off."""
    config: PretrainedConfig = copy.deepcopy(teacher.config)
    if length > original:
        yarn = {"rope_type": "yarn", "factor": length / original, "original_max_position_embeddings": original}
        if hasattr(config, "rope_parameters"):  # transformers 5
            config.rope_parameters = config.rope_parameters | yarn
        else:
            config.rope_scaling = yarn
    config.max_position_embeddings = max(length, original)
    rotary = teacher.model.rotary_emb
    teacher.model.rotary_emb = type(rotary)(config=config, device=rotary.inv_freq.device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
