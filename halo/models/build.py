"""Models built piece by piece: the embedding, each decoder layer, the last norm, the head.

A model begins on the meta device, without memory. A piece gets memory on this rank's device, and its values on rank 0
(halo/models/weights.py), and is *placed* before the next begins: sent to all ranks, and cut if the model is sharded.
So under ZeRO-3 (`halo.training.engine.placement`) and in a sharded teacher a rank holds its share and one whole piece,
never more, and no rank's host memory ever holds a model.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from halo.distributed import broadcast, device
from halo.models.folders import weight_files
from halo.models.generation import read_generation
from halo.models.loading import layer_by_layer, load_model_config, training_dtype
from halo.models.weights import EMBEDDING, HEAD, SafeTensors, Weights, check_shapes
from halo.progress import progress_bar
from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.configuration_hypenet import ATTENTION
from hypenet.transfer import empty_hybrid, layer_from_teacher, mixer_from_attention

Placement = Callable[[nn.Module], object]
"""Sends a new module, whose values are on rank 0, to all ranks; each keeps its share."""


def build_teacher(
    teacher: Path, group: dist.ProcessGroup | None = None, convert: Callable[[nn.Module], None] | None = None
) -> PreTrainedModel:
    """The teacher, frozen, on this rank's device in training precision.

    Args:
        group: the ranks that share it: every decoder layer is cut over them (FSDP2) as it is built. None: each rank
            holds the whole teacher.
        convert: changes each decoder layer in place once it has its values, where no group shares the teacher.

    Raises:
        UserError: as `check_teacher`.
    """
    assert group is None or convert is None, "FSDP gathers what was read"
    model, weights = _teacher_and_weights(teacher)
    mesh = None if group is None else DeviceMesh.from_group(group, device().type)
    layers = set(model.model.layers)

    def place(piece: nn.Module) -> None:
        broadcast(piece.parameters())
        if mesh is not None and piece in layers:
            fully_shard(piece, mesh=mesh, reshard_after_forward=True)
        if convert is not None and piece in layers:
            convert(piece)

    for name, piece in _pieces(model):
        _load_values(piece, name, weights)
        place(piece)
    if mesh is not None:
        _gather_ahead(model.model, mesh)
    return _finished(model, teacher)


def _gather_ahead(body: Any, mesh: DeviceMesh) -> None:
    """Let each layer of a cut teacher gather the next while it computes.

    The layers have one root: so they share streams, and the buffers that belong to them.
    """
    whole = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(body, mesh=mesh, ignored_params=whole)
    for layer, following in pairwise(body.layers):
        layer.set_modules_to_forward_prefetch([following])
    body.layer_by_layer = MethodType(layer_by_layer, body)
    register_fsdp_forward_method(body, "layer_by_layer")


def build_head(teacher: Path) -> Tensor:
    """Only the teacher's output head, [V, E], on this rank's device in training precision.

    Raises:
        UserError: as `check_teacher`.
    """
    model, weights = _teacher_and_weights(teacher)
    head = weights.take(EMBEDDING if model.config.tie_word_embeddings else HEAD)
    broadcast([head])
    return head


def build_mixers(teacher: Path, config: HypeNetConfig, place: Placement) -> dict[int, nn.Module]:
    """Stage 1's mixers: layer index -> the RNN mixer of `config` made from the teacher's attention (Sec. 4.1).

    New weights are drawn from torch's generator of this rank's device, in the order of the layers.

    Args:
        config: of a hybrid without attention layers.

    Raises:
        UserError: as `check_teacher`.
    """
    model, weights = _teacher_and_weights(teacher)
    mixers = {}
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        _load_values(attention, f"model.layers.{i}.self_attn", weights)
        mixers[i] = mixer_from_attention(attention, config, i)
        attention.to("meta")
        place(mixers[i])
    return mixers


def build_student(teacher: Path, config: HypeNetConfig, mixers: Path, place: Placement) -> HypeNetForCausalLM:
    """Stage 2's hybrid: the result of `hybrid_from_teacher`, without the teacher in memory.

    New weights are drawn from torch's generator of this rank's device, in the order of the layers.

    Args:
        config: of the hybrid.
        mixers: stage 1's mixers, a safetensors file with keys `<layer>.<parameter>`, one for each RNN layer.

    Raises:
        UserError: as `check_teacher`, or the mixers' file is damaged.
        ValueError: the mixers are not those of `config`.
    """
    source, weights = _teacher_and_weights(teacher)
    trained = Weights(lambda: SafeTensors([mixers]))
    hybrid = empty_hybrid(config, dtype=training_dtype(), device=device())
    for name, piece in _pieces(hybrid):
        if name.startswith("model.layers."):
            i = int(name.rpartition(".")[2])
            piece = _student_layer(source.model.layers[i], config, i, weights, trained)
            hybrid.model.layers[i] = piece
        else:
            _load_values(piece, name, weights)
        place(piece)
    return _finished(hybrid, teacher)


def _student_layer(layer: nn.Module, config: HypeNetConfig, i: int, weights: Weights, trained: Weights) -> nn.Module:
    name, mixer = f"model.layers.{i}", None
    if config.mixer_types[i] == ATTENTION:
        _load_values(layer, name, weights)
    else:
        for part, module in layer.named_children():
            if part != "self_attn":
                _load_values(module, f"{name}.{part}", weights)
        mixer = {key.removeprefix(f"{i}."): trained.take(key) for key in trained.shapes if key.startswith(f"{i}.")}
    made = layer_from_teacher(layer, config, i, mixer)
    layer.to("meta")
    return made


def build_hybrid(folder: Path, place: Placement) -> HypeNetForCausalLM:
    """A hybrid from its Hugging Face folder, on this rank's device in training precision.

    Raises:
        UserError: its files are damaged, a weight is missing, unknown or of another shape.
    """
    config = HypeNetConfig.from_pretrained(folder)
    config.dtype = training_dtype()
    hybrid = empty_hybrid(config, dtype=training_dtype(), device=device())

    def tensors() -> SafeTensors:
        opened = SafeTensors(weight_files(folder))
        check_shapes(opened, hybrid, f"the hybrid at {folder}")
        return opened

    weights = Weights(tensors)
    for name, piece in _pieces(hybrid):
        _load_values(piece, name, weights)
        place(piece)
    return _finished(hybrid, folder)


def check_teacher(teacher: Path) -> None:
    """Check that a teacher's weights are complete, by the headers of its files. On one rank, without a model.

    Raises:
        UserError: a file is damaged, a weight is missing, unknown or of another shape.
    """
    check_shapes(SafeTensors(weight_files(teacher)), empty_teacher(teacher), f"the teacher at {teacher}")


def _teacher_and_weights(teacher: Path) -> tuple[PreTrainedModel, Weights]:
    """A teacher without weights, frozen, and its weights."""
    model = empty_teacher(teacher)

    def tensors() -> SafeTensors:
        opened = SafeTensors(weight_files(teacher))
        check_shapes(opened, model, f"the teacher at {teacher}")
        return opened

    return model, Weights(tensors)


def empty_teacher(teacher: Path) -> PreTrainedModel:
    """The teacher's shapes, frozen, in training precision: its parameters are on the meta device."""
    config = load_model_config(teacher)
    config.dtype = training_dtype()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=training_dtype()).requires_grad_(False)
    rotary = model.model.rotary_emb
    with device():
        model.model.rotary_emb = type(rotary)(config=config)
    return model


def _pieces(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The names and pieces of a model in order. A head that is tied to the embedding is no piece."""
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(len(model.model.layers))), "model.norm"]
    if not model.config.tie_word_embeddings:
        names.append("lm_head")
    with progress_bar(len(names), "load", unit="piece", delay=5) as bar:
        for name in names:
            yield name, model.get_submodule(name)
            bar.update()


def _load_values(module: nn.Module, name: str, weights: Weights) -> None:
    """Give the module `name`, which is on the meta device, memory and values."""
    state = {key: weights.take(f"{name}.{key}") for key in module.state_dict()}
    module.load_state_dict(state, assign=True)


def _finished(model: PreTrainedModel, source: Path) -> Any:
    """The model in the state in which transformers' `from_pretrained` returns it."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if without := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        raise RuntimeError(f"no piece of the model has {', '.join(without)}")
    generation, _ = read_generation(source)
    if generation is not None:
        model.generation_config = generation
    return model.eval()
