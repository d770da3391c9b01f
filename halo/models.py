"""Loading the models that stages pass on: the teacher, and the hybrid."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halo.config import Config, build
from halo.errors import UserError
from halo.gguf_file import check_gguf, is_gguf, where
from halo.tokenizer import load_tokenizer
from hypenet import HypeNetForCausalLM
from hypenet.mixers import MIXERS
from hypenet.transfer import TEACHERS, hybrid_config, mixer_from_attention

TEACHER_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def training_dtype() -> torch.dtype:
    """bfloat16 on a GPU (Appendix B), float32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def find_teacher(name: str) -> Path:
    """A teacher's local folder, downloaded first if `name` is a hub id, or GGUF file. Checks it without loading it.

    Raises:
        UserError: no such model; no causal language model of a family that can be converted; a tokenizer larger than
            the embedding.
    """
    teacher = Path(name)
    if is_gguf(name):
        if not teacher.is_file():
            raise UserError(f"no teacher at '{name}': there is no such file")
        check_gguf(teacher, TEACHERS)
    else:
        if not teacher.is_dir():
            try:
                teacher = Path(snapshot_download(name, allow_patterns=TEACHER_FILES))
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise UserError(
                    f"no teacher at '{name}': neither a folder nor a model on the hub that can be reached"
                ) from error
        _check_folder(teacher)
    tokenizer, words = load_tokenizer(teacher), _load_config(teacher).vocab_size
    if len(tokenizer) > words:
        raise UserError(
            f"the tokenizer at {teacher} has {len(tokenizer)} tokens, more than the teacher's embedding ({words}): "
            "use the teacher's own tokenizer"
        )
    return teacher


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"the teacher's folder {folder} has no config.json: name a Hugging Face model folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    architectures = config.get("architectures") or ["none named"]
    if not architectures[0].endswith("ForCausalLM"):
        raise UserError(f"the teacher at {folder} is no causal language model (its architecture is {architectures[0]})")
    if config.get("model_type") not in TEACHERS:
        raise UserError(f"the teacher at {folder} is a '{config.get('model_type')}'; supported: {', '.join(TEACHERS)}")
    if config.get("quantization_config"):
        raise UserError(f"the teacher at {folder} is quantized: take the model that it was made from")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"the teacher's folder {folder} has no .safetensors weights")


def _load_config(teacher: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(**where(teacher))
    except Exception as error:
        raise UserError(
            f"the configuration of the teacher at {teacher} cannot be read: {_first_line(error)}"
        ) from error


def check_architecture(teacher: Path, config: Config) -> None:
    """Whether the teacher, the RNN mixer and the architecture's switches go together: one layer without weights.

    Raises:
        UserError: saying what does not fit.
    """
    shape, switches = _load_config(teacher), config.architecture.switches()
    try:
        hybrid = hybrid_config(shape, [], rnn_mixer=config.rnn_mixer, **switches)
        for mixer, given in switches["mixer_options"].items():
            kind: Any = MIXERS[mixer]
            build(kind.Options, given, where=f"architecture.mixer_options.{mixer}")
        with torch.device("meta"):
            layer = AutoModelForCausalLM.from_config(shape).model.layers[0]
        mixer_from_attention(layer.self_attn, hybrid, 0)
    except ValueError as error:
        raise UserError(f"no hybrid of this architecture from {teacher}: {_first_line(error)}") from error


def unpadded(input_ids: Tensor) -> dict[str, Any]:
    """The arguments of one forward of full rows [B, T], without a cache.

    Without the mask of ones, transformers 4 builds one of [T, T] for Qwen3.
    """
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}


def load_teacher(teacher: Path) -> PreTrainedModel:
    """The teacher in training precision, on the CPU.

    Raises:
        UserError: its weights are damaged, or not all there.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **where(teacher), dtype=training_dtype(), output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"the teacher at {teacher} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"the teacher at {teacher} lacks weights, {min(report['missing_keys'])} among them")
    return model


def load_head(teacher: Path) -> Tensor:
    """The teacher's output head alone, [V, E] in training precision, on the CPU. From a GGUF file all is read.

    Raises:
        UserError: it is not there, or damaged.
    """
    if is_gguf(str(teacher)):
        return load_teacher(teacher).lm_head.weight.detach()
    tied = _load_config(teacher).tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    try:
        for file in sorted(teacher.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                if name in weights.keys():  # noqa: SIM118, it is no mapping
                    return weights.get_tensor(name).to(training_dtype())
    except SafetensorError as error:
        raise UserError(f"the teacher at {teacher} cannot be loaded: {_first_line(error)}") from error
    raise UserError(f"the teacher at {teacher} lacks weights, {name} among them")


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
