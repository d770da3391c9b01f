"""Functions that the training tests run on each rank: importable, with picklable arguments."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from halo.config import Distill, Training
from halo.data.needle import NeedleSample
from halo.distributed import on_rank0, rank
from halo.measuring.probe import ProbeText, measure_of
from halo.models.build import build_hybrid, build_mixers, build_student, build_teacher
from halo.models.loading import load_model_config
from halo.parallel.sequence import SequenceGroup
from halo.ranks import RankLayout
from halo.run import StageFolder
from halo.stages.align import new_mixers
from halo.stages.distill import logits_form
from halo.teacher.batch import Batch
from halo.teacher.colocated import Teacher, teacher_model
from halo.teacher.dedicated import DedicatedTeacher, Order
from halo.training import engine, fused_step, trainer
from halo.training.engine import Engine, placement, read_ds_config, split_batch
from halo.training.objectives import Alignment, Distillation, NextToken
from halo.training.trainer import Objective, Probe, Result, train
from hypenet.transfer import hybrid_config, hybrid_from_teacher

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


def make_teacher(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | changes))


def make_student(teacher: Qwen3ForCausalLM):
    torch.manual_seed(1)
    return hybrid_from_teacher(teacher, hybrid_config(teacher.config, attention_layers=[1])).float()


def files(folder: Path, **changes: Any) -> Path:
    """A folder with the inputs of stages: a teacher, the mixers of stage 1, the hybrid of stage 2."""
    made = folder.with_name(f"{folder.name}-files")

    def write() -> None:
        teacher = make_teacher(**changes)
        teacher.save_pretrained(made / "teacher", max_shard_size="20kB")
        torch.manual_seed(1)
        StageFolder(made, {}).save_tensors("mixers.safetensors", whole_mixers(teacher))
        make_student(teacher).save_pretrained(made / "hybrid", max_shard_size="20kB")

    on_rank0(write)
    return made


def whole_mixers(teacher: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """Every layer's mixer weights, with the names of stage 1's file."""
    mixers = new_mixers(teacher, "lightning-attn")
    return {f"{i}.{name}": weight for i, mixer in mixers.items() for name, weight in mixer.state_dict().items()}


def batch_of(objective: Objective, input_ids: torch.Tensor) -> Batch:
    """A batch of [B, T] tokens on the host, with what the objective's teacher supplies."""
    batch = Batch.on_host(input_ids, objective.separator)
    if objective.teacher is None:
        return batch
    objective.teacher.prefetch(batch)
    return replace(batch, teacher_logits=objective.teacher.next())


def training(**changes: Any) -> Distill:
    defaults = {"seq_len": 16, "batch": 8, "micro_batch": 8, "steps": 6, "lr": 1e-3, "warmup": 2, "save_every": 100}
    return Distill(**defaults | changes)


def run(objective: Objective, settings: Training, shards: Path, folder: Path, zero: str) -> Result:
    stage, ds_config = StageFolder(folder, {"lr": settings.lr}), read_ds_config(DS_CONFIGS / zero)
    every = getattr(settings, "probe_every", 0)
    probe = Probe(every=every, measure=measure_of(objective, settings, probe_text())) if every else None
    return train(objective, settings, shards=shards, folder=stage, ds_config=ds_config, probe=probe)


def probe_text() -> ProbeText:
    """Seven windows, and eleven needles of each of two lengths, with answers of one or two tokens."""
    rng = np.random.default_rng(1)
    needles: dict[str, list[NeedleSample]] = {}
    for length in (16, 40):
        rows = rng.integers(0, 8, (11, length)).tolist()
        cut = [length - 1 - row % 2 for row in range(11)]
        needles[f"niah_single_1/{length}"] = [
            NeedleSample(variant="niah_single_1", prompt_ids=row[:at], answer_ids=row[at:], answer="", depth=0.5)
            for row, at in zip(rows, cut, strict=True)
        ]
    return ProbeText(windows=torch.from_numpy(rng.integers(0, 64, (7, 16))), needles=needles)


def distill(shards: Path, folder: Path, zero: str, settings: Distill, tied: bool = True) -> Result:
    """A few steps of stage 2 on this rank."""
    made = files(folder, tie_word_embeddings=tied)
    where = {"sharded": settings.teacher_sharded, "fp8": settings.teacher_fp8, "attention": "sdpa"}
    teacher = teacher_model(made / "teacher", **where)
    objective = Distillation(
        student_of(made, zero, settings),
        Teacher(
            teacher,
            logits_form(settings, SHAPE["vocab_size"]),
            SequenceGroup(settings.sequence_parallel, apart=True),
        ),
        sequence=SequenceGroup(settings.sequence_parallel),
        temperature=settings.temperature,
        activation_checkpointing=settings.activation_checkpointing,
        kept_layers=settings.kept_layers,
    )
    return run(objective, settings, shards, folder, zero)


def student_of(made: Path, zero: str, settings: Distill) -> PreTrainedModel:
    torch.manual_seed(1)
    config = hybrid_config(load_model_config(made / "teacher"), attention_layers=[1])
    place = placement(read_ds_config(DS_CONFIGS / zero), settings)
    return build_student(made / "teacher", config, made / "mixers.safetensors", place)


def save_teacher(folder: Path, tied: bool = True) -> Path:
    """`distill`'s teacher, for ranks of its own to load."""
    make_teacher(tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def dedicated(shards: Path, folder: Path, zero: str, settings: Distill, teacher: Path, split: RankLayout) -> Result:
    """The same with a dedicated teacher."""
    micro_batch, _ = split_batch(settings)
    order = Order(
        teacher=str(teacher),
        sharded=settings.teacher_sharded,
        fp8=settings.teacher_fp8,
        form=logits_form(settings, SHAPE["vocab_size"]),
        attention="sdpa",
        batch=micro_batch,
        seq_len=settings.seq_len,
    )
    with DedicatedTeacher(split, order) as asked:
        student = student_of(files(folder), zero, settings)
        objective = Distillation(student, asked, temperature=settings.temperature)
        return run(objective, settings, shards, folder, zero)


def align(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """A few steps of stage 1 on this rank."""
    teacher = files(folder) / "teacher"
    whole = build_teacher(teacher)
    torch.manual_seed(1)
    place = placement(read_ds_config(DS_CONFIGS / zero), settings)
    mixers = build_mixers(teacher, hybrid_config(whole.config, attention_layers=[]), place)
    objective = Alignment(mixers, Teacher(whole))
    return run(objective, settings, shards, folder, zero)


def finetune(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """A few steps of stage 3 on this rank."""
    place = placement(read_ds_config(DS_CONFIGS / zero), settings)
    objective = NextToken(build_hybrid(files(folder) / "hybrid", place))
    return run(objective, settings, shards, folder, zero)


def with_fused_step(job: Callable[..., Any], *args: Any) -> Any:
    """`job`, stepped by the kernel of a GPU, in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # the kernel's module is not imported yet
    engine.fused_step_serves = lambda zero: True
    calls = []
    plain = fused_step.FusedAdamW.run
    fused_step.FusedAdamW.run = lambda *args: (calls.append(1), plain(*args))
    result = job(*args)
    assert calls
    return result


def first_moments(job: Callable[..., Result], *args: Any) -> Result:
    """`job`, but its result has AdamW's first moments as weights: they show each gradient's size."""

    class Watched(Engine):
        def parameters_on_rank0(self) -> dict[str, torch.Tensor]:
            if self.zero_stage < 3:  # DeepSpeed links them after the first group's step, when the others have none
                self._engine.optimizer._hp_optimizer_states_linked = False
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
            named = self.module.named_parameters()
            return {name: safe_get_full_optimizer_state(p, "exp_avg").cpu().clone() for name, p in named}

    trainer.Engine = Watched
    return job(*args)


def losses(folder: Path) -> list[float]:
    """Of every step of a run, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def digest(built: Engine) -> str:
    """Of this rank's share of the weights, in both precisions, and of the optimizer's state."""
    zero = built._engine.optimizer
    masters = zero.fp32_partitioned_groups_flat if built.zero_stage == 3 else zero.single_partition_of_fp32_groups
    weights = [parameter.ds_tensor if built.zero_stage == 3 else parameter for parameter in built.module.parameters()]
    moments = [value for state in zero.optimizer.state.values() for _, value in sorted(state.items())]
    whole = hashlib.sha256()
    for tensor in [*masters, *weights, *moments]:
        whole.update(tensor.detach().float().numpy().tobytes())
    return whole.hexdigest()


class Noisy(NextToken):
    """A loss that draws random numbers, each rank other ones."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(batch)
        return loss * (1 + torch.rand(rank() + 1)[-1]), metrics


def noisy(shards: Path, folder: Path, zero: str, settings: Training) -> None:
    run(Noisy(make_student(make_teacher())), settings, shards, folder, zero)


def partly_frozen(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """Training with a parameter of 4 MB that is frozen."""
    place = placement(read_ds_config(DS_CONFIGS / zero), settings)
    objective = NextToken(build_hybrid(files(folder) / "hybrid", place))
    objective.register_parameter("ballast", torch.nn.Parameter(torch.ones(1000, 1000), requires_grad=False))
    return run(objective, settings, shards, folder, zero)


def use_bf16() -> None:
    """Have engines cast to bf16, as on a GPU."""
    plain = engine.complete_ds_config
    engine.complete_ds_config = lambda config, t: plain(config, t) | {"bf16": {"enabled": True}}


def buffers_under_bf16() -> list[torch.Tensor]:
    """RoPE's frequencies of a plain Qwen3 in an engine that casts to bf16, as on a GPU."""
    use_bf16()
    built = Engine(NextToken(make_teacher()), training(), read_ds_config(DS_CONFIGS / "zero1.json"))
    assert all(parameter.dtype == torch.bfloat16 for parameter in built.module.parameters())
    return list(built.module.buffers())
