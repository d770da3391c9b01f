"""Functions that the tests of building run on each rank: importable, with picklable arguments."""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import nn
from torch.distributed.tensor import DTensor

from halo.errors import UserError
from halo.models import build, weights
from halo.models.build import build_hybrid, build_mixers, build_student, build_teacher
from halo.models.loading import load_model_config, load_teacher
from halo.stages.align import new_mixers
from halo.teacher.colocated import teacher_group
from halo.training.engine import Engine, placement, read_ds_config
from halo.training.objectives import NextToken
from hypenet import HypeNetForCausalLM
from hypenet.transfer import hybrid_config, hybrid_from_teacher
from tests.distributed import jobs

KEPT = [1]
M_MMAP_THRESHOLD = -3  # malloc.h


def place_by(zero: str) -> build.Placement:
    return placement(read_ds_config(jobs.DS_CONFIGS / zero), jobs.training())


def student(made: Path, place: build.Placement) -> HypeNetForCausalLM:
    """A student from files, always with the same seed."""
    torch.manual_seed(1)
    config = hybrid_config(load_model_config(made / "teacher"), KEPT)
    return build_student(made / "teacher", config, made / "mixers.safetensors", place)


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, gathered on every rank."""
    tensors = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            tensors[name] = full.detach().clone()
    return tensors


def every_model(made: Path, zero: str) -> dict[str, dict[str, torch.Tensor]]:
    """The models that each stage builds, gathered."""
    config = hybrid_config(load_model_config(made / "teacher"), [])
    place = place_by(zero)
    torch.manual_seed(1)
    mixers = build_mixers(made / "teacher", config, place)
    return {
        "mixers": {f"{i}.{name}": w for i, mixer in mixers.items() for name, w in whole(mixer).items()},
        "student": whole(student(made, place)),
        "hybrid": whole(build_hybrid(made / "hybrid", place)),
        "replicated": whole(build_teacher(made / "teacher")),
        "sharded": whole(build_teacher(made / "teacher", teacher_group("sharded"))),
    }


def every_model_in_memory(made: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The same models, each made from a whole teacher in memory."""
    teacher = load_teacher(made / "teacher")
    torch.manual_seed(1)
    mixers = new_mixers(teacher, "lightning-attn")
    torch.manual_seed(1)
    kept = hybrid_config(teacher.config, KEPT)
    hybrid = hybrid_from_teacher(teacher, kept, {i: mixer.state_dict() for i, mixer in mixers.items()})
    return {
        "mixers": {f"{i}.{name}": w.detach() for i, mixer in mixers.items() for name, w in mixer.named_parameters()},
        "student": whole(hybrid),
        "hybrid": whole(HypeNetForCausalLM.from_pretrained(made / "hybrid")),
        "replicated": whole(teacher),
        "sharded": whole(teacher),
    }


def in_engines(made: Path) -> list[dict[str, torch.Tensor]]:
    """The student's parameters on rank 0, in an engine of each DeepSpeed configuration."""
    found = []
    for path in sorted(jobs.DS_CONFIGS.glob("*.json")):
        model = student(made, place_by(path.name))
        objective = NextToken(model)
        built = Engine(objective, jobs.training(), read_ds_config(path), objective.external_parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        found.append(built.parameters_on_rank0())
        built.close()
    return found


def in_bf16(made: Path) -> dict[str, set[torch.dtype]]:
    """As on a GPU: the dtypes of what an engine of a partitioned student holds."""
    jobs.use_bf16()
    for module in (build, weights):
        module.training_dtype = lambda: torch.bfloat16
    model = student(made, place_by("zero3.json"))
    built = Engine(NextToken(model), jobs.training(), read_ds_config(jobs.DS_CONFIGS / "zero3.json"))
    masters = built._engine.optimizer.fp32_partitioned_groups_flat
    return {
        "weights": {parameter.ds_tensor.dtype for parameter in model.parameters()},
        "masters": {tensor.dtype for tensor in masters},
        "buffers": {buffer.dtype for buffer in model.buffers()},
    }


def pieces_whole_at_once(made: Path) -> list[tuple[int, int]]:
    """Bytes of the student's parameters on this rank, before and after each piece is distributed."""
    partition, placed = place_by("zero3.json"), []
    seen: list[tuple[int, int]] = []

    def held() -> int:
        """Bytes of whole parameters."""
        parameters = [p for piece in placed for p in piece.parameters()]
        assert not any(p.is_meta for p in parameters)
        return sum(p.numel() * p.element_size() for p in parameters)

    def place(piece: nn.Module) -> None:
        placed.append(piece)
        before = held()
        partition(piece)
        seen.append((before, held()))

    student(made, place)
    return seen


def growth(make: Callable[..., Any], *args: Any) -> float:
    """MB by which this process's own memory, without mapped files, grew at most while `make` ran."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is given back, not kept for later
    most, ended = own_memory(), threading.Event()
    began = most

    def watch() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, own_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        make(*args)
    finally:
        ended.set()
        watcher.join()
    return most - began


def own_memory() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


def partitioned(made: Path) -> float:
    """MB by which a rank grows for a student under ZeRO-3."""
    return growth(student, made, place_by("zero3.json"))


def sharded(made: Path) -> float:
    """MB by which a rank grows for a teacher cut over two."""
    return growth(build_teacher, made / "teacher", teacher_group("sharded"))


def in_memory(made: Path) -> float:
    """MB by which a rank grows for a whole student, and a teacher that stays in mapped files."""

    def make() -> None:
        teacher = load_teacher(made / "teacher")
        hybrid_from_teacher(teacher, hybrid_config(teacher.config, KEPT))

    return growth(make)


def refusals(made: Path) -> list[str]:
    """Each builder's UserError, on this rank."""
    told = []
    for make in (
        lambda: build_teacher(made / "teacher"),
        lambda: build_hybrid(made / "hybrid", place_by("zero3.json")),
    ):
        try:
            make()
        except UserError as error:
            told.append(str(error))
    return told
