"""What the training tests run on each rank: importable functions with picklable arguments."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo import engine
from halo.config import Distill, Training
from halo.engine import read_ds_config
from halo.objectives import Alignment, Distillation, NextToken
from halo.run import StageFolder
from halo.stages.align import new_mixers
from halo.teacher import Teacher
from halo.trainer import Objective, Result, train
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


def training(**changes: Any) -> Distill:
    defaults = {"seq_len": 16, "batch": 8, "micro_batch": 8, "steps": 6, "lr": 1e-3, "warmup": 2, "save_every": 100}
    return Distill(**defaults | changes)


def run(objective: Objective, settings: Training, shards: Path, folder: Path, zero: str) -> Result:
    stage = StageFolder(folder, {"lr": settings.lr})
    return train(objective, settings, shards=shards, folder=stage, ds_config=read_ds_config(DS_CONFIGS / zero))


def distill(shards: Path, folder: Path, zero: str, settings: Distill, tied: bool = True) -> Result:
    """A few steps of stage 2 on this rank."""
    teacher = make_teacher(tie_word_embeddings=tied)
    objective = Distillation(
        make_student(teacher),
        Teacher(teacher, settings.teacher_placement),
        activation_checkpointing=settings.activation_checkpointing,
    )
    return run(objective, settings, shards, folder, zero)


def align(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """A few steps of stage 1 on this rank."""
    teacher = make_teacher()
    torch.manual_seed(1)
    objective = Alignment(new_mixers(teacher, "lightning-attn"), Teacher(teacher))
    return run(objective, settings, shards, folder, zero)


def finetune(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """A few steps of stage 3 on this rank."""
    objective = NextToken(make_student(make_teacher()))
    return run(objective, settings, shards, folder, zero)


def buffers_under_bf16() -> list[torch.Tensor]:
    """RoPE's frequencies of a plain Qwen3 in an engine that casts to bf16, as on a GPU."""
    settings = training()
    plain = engine.complete_ds_config
    engine.complete_ds_config = lambda config, t: plain(config, t) | {"bf16": {"enabled": True}}
    built = engine.Engine(NextToken(make_teacher()), settings, read_ds_config(DS_CONFIGS / "zero1.json"))
    assert all(parameter.dtype == torch.bfloat16 for parameter in built.module.parameters())
    return list(built.module.buffers())
