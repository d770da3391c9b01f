"""Loading whole models: the teacher, and the hybrid."""

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halo.accelerator import on_gpu
from halo.config import Config
from halo.errors import UserError, first_line
from halo.models.families import check_family, family_keys, model_keys, window_of
from halo.models.folders import WEIGHTS, check_no_code, fetch_small_files, fetch_weights
from halo.models.gguf import check_gguf, is_gguf, unpacked_folder, where
from halo.models.tokenizer import load_tokenizer
from halo.tables import build
from hypenet import HypeNetForCausalLM
from hypenet.mixers import MIXERS
from hypenet.modeling_hypenet import HypeNetPreTrainedModel
from hypenet.rope import ROPE_BY_LENGTH, installed_rope
from hypenet.transfer import hybrid_config, mixer_from_attention


def training_dtype() -> torch.dtype:
    """bfloat16 on a GPU (Appendix B), float32 on the CPU."""
    return torch.bfloat16 if on_gpu() else torch.float32


def find_teacher(name: str) -> Path:
    """A teacher's local folder: downloaded first if `name` is a hub id, unpacked if it is a GGUF file.

    It is checked before its weights are.

    Raises:
        UserError: no such model; no causal language model of a family that can be converted; a tokenizer larger than
            the embedding; a file of it that is missing, or a Git-LFS pointer.
    """
    teacher = Path(name)
    if is_gguf(name):
        if not teacher.is_file():
            raise UserError(f"no teacher at '{name}': there is no such file")
        teacher = _unpacked(teacher)
    else:
        teacher = fetch_small_files(name)
        _check_folder(teacher)
    tokenizer, words = load_tokenizer(teacher), load_model_config(teacher).vocab_size
    if len(tokenizer) > words:
        raise UserError(
            f"the tokenizer at {teacher} has {len(tokenizer)} tokens, more than the teacher's embedding ({words}): "
            "use the teacher's own tokenizer"
        )
    if not is_gguf(name):
        fetch_weights(name, teacher)
    return teacher


def _unpacked(file: Path) -> Path:
    """A GGUF file as a model's folder in the cache, in training precision. Read only if it is not there.

    Raises:
        UserError: as `check_gguf` and `load_tokenizer`; or it cannot be loaded, or written.
    """
    folder = unpacked_folder(file, str(training_dtype()))
    if folder.is_dir():
        return folder
    check_gguf(file)
    tokenizer = load_tokenizer(file)
    partial = folder.with_name(f"{folder.name}.{uuid4().hex}")  # another run may unpack the same file now
    try:
        _save_weights(load_teacher(file), load_model_config(file), partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"{file} cannot be unpacked into {folder} (set HF_HOME): {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _save_weights(model: PreTrainedModel, config: PretrainedConfig, folder: Path) -> None:
    """As `save_pretrained`, by which transformers 5 does not save what it read from a GGUF file."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"the teacher's folder {folder} has no config.json: name a Hugging Face model folder")
    keys = model_keys(folder / "config.json")
    architectures = keys.get("architectures") or ["none named"]
    if not architectures[0].endswith("ForCausalLM"):
        raise UserError(f"the teacher at {folder} is no causal language model (its architecture is {architectures[0]})")
    check_family(keys.get("model_type"), folder)
    check_no_code(folder)
    if keys.get("quantization_config"):
        raise UserError(f"the teacher at {folder} is quantized: take the model that it was made from")


def load_model_config(teacher: Path) -> PretrainedConfig:
    """The configuration of a teacher's folder or GGUF file.

    One written by transformers 4 or 5 means the same in either: what the installed one would not read is put into its
    terms, or refused.

    Raises:
        UserError: it cannot be read, or is not understood.
    """
    try:
        if is_gguf(teacher):
            config = AutoConfig.from_pretrained(**where(teacher))
            check_family(config.model_type, teacher)
            return config
        keys = model_keys(teacher / "config.json")
        check_family(keys.get("model_type"), teacher)
        keys = family_keys(installed_rope(keys))
        config = CONFIG_MAPPING[keys["model_type"]].from_dict(keys)
        config.name_or_path = str(teacher)
        return config
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the configuration of the teacher at {teacher} cannot be read: {first_line(error)}") from error


def check_architecture(teacher: Path, config: Config) -> None:
    """Whether the teacher, the RNN mixer and the architecture's switches fit: tried on one layer without weights.

    Raises:
        UserError: naming what does not fit.
    """
    shape, switches = load_model_config(teacher), config.architecture.switches()
    try:
        hybrid = hybrid_config(shape, [], rnn_mixer=config.rnn_mixer, **switches)
        for mixer, given in switches["mixer_options"].items():
            kind: Any = MIXERS[mixer]
            build(kind.Options, given, where=f"architecture.mixer_options.{mixer}")
        with torch.device("meta"):
            layer = AutoModelForCausalLM.from_config(shape).model.layers[0]
        mixer_from_attention(layer.self_attn, hybrid, 0)
    except ValueError as error:
        raise UserError(f"no hybrid of this architecture from {teacher}: {first_line(error)}") from error
    except Exception as error:  # whatever torch and transformers make of sizes that do not fit together
        kind = type(error).__name__
        raise UserError(f"no hybrid of this architecture from {teacher}: {kind}: {first_line(error)}") from error


def unpadded(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """The arguments of a forward of full rows [B, T], without a cache.

    HypeNet gets no mask: it would look for padding in it, and the host would wait. Without a mask of ones,
    transformers 4 builds one of [T, T] for its own Qwen3.
    """
    mask = None if isinstance(model, HypeNetPreTrainedModel) else torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
def frozen_states(model: PreTrainedModel, input_ids: Tensor, first: int = 0) -> Tensor:
    """Final hidden states of full rows, [B, T] -> [B, T, D], layer by layer: the host never waits for the GPU.

    A forward of transformers' models reads its mask on the host. Here there is none; only a window that is shorter
    than the rows needs one.

    Args:
        first: the position of the first token, if the rows are chunks of longer ones (halo/parallel/sequence.py).
    """
    tokens, body = input_ids.shape[1], model.model
    if not _sees_all(model, tokens):
        assert first == 0, "no chunk of rows in which not every token sees all before it"
        return body(**unpadded(model, input_ids)).last_hidden_state
    run = getattr(body, "layer_by_layer", partial(layer_by_layer, body))
    return run(input_ids, first)


def layer_by_layer(body: Any, input_ids: Tensor, first: int) -> Tensor:
    """`frozen_states` of a model's body, where every token sees all before it. It is the body's method in a cut teacher
    (`build_teacher`): FSDP must know that it is a forward."""
    states = body.embed_tokens(input_ids)
    positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]
    rope = body.rotary_emb(states, positions)
    for layer in body.layers:
        states = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rope, use_cache=False)
    return body.norm(states)


def never_looks(model: PreTrainedModel, tokens: int) -> bool:
    """Whether `frozen_states` of rows of `tokens` tokens decides nothing by values on the GPU."""
    return _sees_all(model, tokens) and model.model.rotary_emb.rope_type not in ROPE_BY_LENGTH


def _sees_all(model: PreTrainedModel, tokens: int) -> bool:
    """Whether without a mask each of `tokens` tokens sees all before it and none after: there is no shorter window, and
    attention is not the plain implementation, which sees everything then."""
    if model.config._attn_implementation == "eager":
        return False
    windows = [window_of(layer.self_attn) for layer in model.model.layers]
    return all(window is None or window >= tokens for window in windows)


def load_teacher(teacher: Path) -> PreTrainedModel:
    """The teacher in training precision, on the CPU.

    Raises:
        UserError: its weights are damaged or incomplete.
    """
    config = load_model_config(teacher)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **where(teacher), config=config, dtype=training_dtype(), output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"the teacher at {teacher} cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"the teacher at {teacher} lacks weights, {min(report['missing_keys'])} among them")
    return model


def load_hybrid(folder: Path) -> HypeNetForCausalLM:
    """Raises:
    UserError: as `check_no_code`.
    """
    return HypeNetForCausalLM.from_pretrained(**where(folder), dtype=training_dtype())


def apply_yarn(teacher: PreTrainedModel, length: int, original: int) -> None:
    """Stretch a teacher's RoPE from `original` to `length` with YaRN, or remove YaRN if `length` is not longer."""
    config: PretrainedConfig = copy.deepcopy(teacher.config)
    if length > original:
        yarn = {"rope_type": "yarn", "factor": length / original, "original_max_position_embeddings": original}
        if hasattr(config, "rope_parameters"):  # transformers 5
            config.rope_parameters = config.rope_parameters | yarn
        else:
            config.rope_scaling = yarn
    config.max_position_embeddings = max(length, original)
    rotary = teacher.model.rotary_emb
    with rotary.inv_freq.device:
        teacher.model.rotary_emb = type(rotary)(config=config)
