"""Functions that the training tests run on each rank: importable, with picklable arguments."""

import hashlib
import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from halo.config import Distill, Training
from halo.data.needle import NeedleSample
from halo.distributed import on_rank0, rank
from halo.errors import Stopped, UserError
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
from halo.training.background import Files, Writing
from halo.training.checkpoint import Checkpoints
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


def at_step(step: int, do: Callable[[], None], job: Callable[..., Any], *args: Any) -> Any:
    """Run `job`, and `do` as the 0-based `step` begins."""
    plain = trainer.learning_rate

    def learning_rate(settings: Training, now: int) -> float:
        if now == step:
            do()
        return plain(settings, now)

    trainer.learning_rate = learning_rate
    return job(*args)


def written_at_once(job: Callable[..., Any], *args: Any) -> Any:
    """`job`, where a checkpoint is published by the end of the step after it: each rank waits for its part there."""
    plain = Checkpoints.is_written

    def is_written(self: Checkpoints) -> bool:
        if self._pending is not None:
            self._pending.writing._thread.join()
        return plain(self)

    Checkpoints.is_written = is_written
    return job(*args)


def written_late(job: Callable[..., Any], *args: Any) -> Any:
    """`job`, where no checkpoint is written before the run stands still to wait for it."""
    awaited = threading.Event()
    run_thread, wait = Writing._run, Writing.wait

    def wait_for_wait(self: Writing) -> None:
        awaited.wait()
        run_thread(self)

    def waited_for(self: Writing) -> tuple[Files, float]:
        awaited.set()
        try:
            return wait(self)
        finally:
            awaited.clear()

    Writing._run, Writing.wait = wait_for_wait, waited_for
    return job(*args)


def failing(step: int, job: Callable[..., Any], *args: Any) -> None:
    """`job`, whose process fails as `step` begins."""

    def fail() -> None:
        raise RuntimeError("stopped")

    at_step(step, fail, job, *args)


def interrupted(step: int, job: Callable[..., Any], *args: Any) -> None:
    """The same, where a checkpoint is published by the end of the step after it."""
    written_at_once(failing, step, job, *args)


def interrupted_amid_writing(step: int, job: Callable[..., Any], *args: Any) -> None:
    """The same, where nothing is written yet of what was last saved."""
    written_late(failing, step, job, *args)


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
    return refused(at_step, step, lambda: _limit_files(50_000) if rank() == 1 else None, job, *args)


def with_no_room_for(pattern: str, step: int, job: Callable[..., Any], shards: Path, folder: Path, *args: Any) -> str:
    """`job`, where a file of rank 0's in `folder` can grow no more from `step` on. Returns what it was refused with."""

    def fill() -> None:
        if rank() == 0:
            (file,) = folder.glob(pattern)
            _limit_files(file.stat().st_size)

    return refused(at_step, step, fill, job, shards, folder, *args)


def refused(job: Callable[..., Any], *args: Any) -> str:
    """What `job` is refused with."""
    try:
        written_at_once(job, *args)
    except UserError as error:
        return str(error)
    raise AssertionError("the run did not end")


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


BAD = 63
"""A sample that begins with this token has no finite loss, or gradient, in a Fragile objective."""


class Fragile(NextToken):
    gradient_alone = False

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = super().forward(batch)
        if (batch.input_ids[:, 0] == BAD).any():
            # The square root is 0, and infinitely steep there.
            loss = loss + ((loss - loss.detach()).sqrt() if self.gradient_alone else torch.inf)
        return loss, metrics


def fragile(
    shards: Path,
    folder: Path,
    zero: str,
    settings: Training,
    bf16: bool = False,
    skip: int = 0,
    gradient_alone: bool = False,
) -> list[str]:
    """Training on data that may be bad. Returns digests of all of this rank's state, after each step.

    Args:
        skip: batches that are left out before step 3.
        gradient_alone: what is bad has a loss that is finite.
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
    Fragile.gradient_alone = gradient_alone
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
