"""What the training tests run on each rank: importable functions with picklable arguments."""

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo import engine, trainer
from halo.config import Distill, Training
from halo.dedicated import DedicatedTeacher, Order
from halo.distributed import rank
from halo.engine import Engine, read_ds_config, split_batch
from halo.errors import Stopped, UserError
from halo.objectives import Alignment, Distillation, NextToken
from halo.run import StageFolder
from halo.split import Split
from halo.stages.align import new_mixers
from halo.stages.distill import logits_form
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
    form = logits_form(settings, SHAPE["vocab_size"])
    objective = Distillation(
        make_student(teacher),
        Teacher(teacher, sharded=settings.teacher_sharded, form=form),
        temperature=settings.temperature,
        activation_checkpointing=settings.activation_checkpointing,
    )
    return run(objective, settings, shards, folder, zero)


def save_teacher(folder: Path, tied: bool = True) -> Path:
    """`distill`'s teacher, for ranks of its own to load."""
    make_teacher(tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def dedicated(shards: Path, folder: Path, zero: str, settings: Distill, teacher: Path, split: Split) -> Result:
    """The same where the teacher is on ranks of its own."""
    student = make_student(make_teacher())
    micro_batch, _ = split_batch(settings)
    order = Order(
        teacher=str(teacher),
        sharded=settings.teacher_sharded,
        form=logits_form(settings, SHAPE["vocab_size"]),
        batch=micro_batch,
        seq_len=settings.seq_len,
    )
    with DedicatedTeacher(split, order) as asked:
        objective = Distillation(student, asked, temperature=settings.temperature)
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


def losses(folder: Path) -> list[float]:
    """Of every step of a run, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def at_step(step: int, do: Callable[[], None], job: Callable[..., Any], *args: Any) -> Any:
    """Run `job`, and `do` as the 0-based `step` begins."""
    plain = trainer.learning_rate

    def learning_rate(settings: Training, now: int) -> float:
        if now == step:
            do()
        return plain(settings, now)

    trainer.learning_rate = learning_rate
    return job(*args)


def interrupted(step: int, job: Callable[..., Any], *args: Any) -> None:
    """`job`, whose process fails as `step` begins."""

    def fail() -> None:
        raise RuntimeError("stopped")

    at_step(step, fail, job, *args)


def asked_to_stop(step: int, number: int, job: Callable[..., Any], *args: Any) -> str:
    """`job`, where a signal comes to rank 1 alone in `step`."""
    try:
        at_step(step, lambda: os.kill(os.getpid(), number) if rank() == 1 else None, job, *args)
    except Stopped as stopped:
        return str(stopped)
    raise AssertionError("the run did not stop")


def frozen_in_time(step: int, limit: float, job: Callable[..., Any], *args: Any) -> None:
    """`job`, where rank 1 halts in `step`, and the other waits at most `limit` seconds for it."""
    trainer.STEP_LIMIT = timedelta(seconds=limit)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP) if rank() == 1 else None, job, *args)


def on_a_full_disk(step: int, job: Callable[..., Any], *args: Any) -> str:
    """`job`, where rank 1 can write no file above 50 kB from `step` on. Returns what it was refused with."""

    def fill() -> None:
        if rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    try:
        at_step(step, fill, job, *args)
    except UserError as error:
        return str(error)
    raise AssertionError("the run did not end")


BAD = 63
"""A sample that begins with this token has no finite loss, in a Fragile objective."""


class Fragile(NextToken):
    def forward(self, input_ids: torch.Tensor, **taught: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(input_ids)
        return loss + torch.where((input_ids[:, 0] == BAD).any(), torch.inf, 0.0), metrics


def fragile(shards: Path, folder: Path, zero: str, settings: Training, bf16: bool = False, skip: int = 0) -> list[str]:
    """Training on data that may be bad. Returns digests of all of this rank's state, after each step.

    Args:
        skip: batches that are left out before step 3.
    """
    digests: list[str] = []

    class Watched(Engine):
        def skipped(self) -> bool:
            digests.append(digest(self))
            return super().skipped()

    class Skipping(trainer.TokenStream):
        def __next__(self) -> torch.Tensor:
            if self._consumed == 3 * settings.batch:
                self._consumed += skip * settings.batch
            return super().__next__()

    trainer.Engine, trainer.TokenStream = Watched, Skipping
    if bf16:
        use_bf16()
    run(Fragile(make_student(make_teacher())), settings, shards, folder, zero)
    return digests


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

    def forward(self, input_ids: torch.Tensor, **taught: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(input_ids)
        return loss * (1 + torch.rand(rank() + 1)[-1]), metrics


def noisy(shards: Path, folder: Path, zero: str, settings: Training) -> None:
    run(Noisy(make_student(make_teacher())), settings, shards, folder, zero)


def partly_frozen(shards: Path, folder: Path, zero: str, settings: Training) -> Result:
    """Training with a parameter of 4 MB that is frozen."""
    objective = NextToken(make_student(make_teacher()))
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
