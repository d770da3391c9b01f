"""Stage 2: the whole hybrid learns the teacher's distribution, end to end (Eq. 10).

Writes `hybrid/`: the model as transformers saves it.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halo.config import CheckpointedTraining, Distill
from halo.context import Context
from halo.data.stage_shards import check_data, shards_for
from halo.distributed import on_rank0
from halo.errors import UserError
from halo.measuring.probe import check_probe, probe_of
from halo.models.attention_functions import use_attention
from halo.models.build import build_student, empty_teacher
from halo.models.loading import load_model_config
from halo.parallel.sequence import SequenceGroup
from halo.ranks import RankLayout
from halo.run import StageFolder, atomic_folder
from halo.stages.align import MIXERS_FILE
from halo.stages.selection import SCORES, Kept
from halo.teacher.colocated import Teacher, TeacherSource, teacher_model
from halo.teacher.dedicated import DedicatedTeacher, Order
from halo.teacher.fp8 import check_fp8
from halo.teacher.logits import LogitsForm
from halo.training.engine import placement, split_batch
from halo.training.objectives import Distillation
from halo.training.trainer import Result, train
from hypenet.transfer import hybrid_config

HYBRID = "hybrid"


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_data`, `check_probe`, `logits_form` and `check_fp8`.
    """
    check_data(context, "distill")
    check_probe(context, "distill")
    logits_form(context.config.distill, load_model_config(context.teacher).vocab_size)
    if context.config.distill.teacher_fp8:
        check_fp8(empty_teacher(context.teacher).model.layers)


def run(context: Context) -> None:
    folder, training = context.folder("distill"), context.config.distill
    shards = shards_for(context, "distill")
    shapes = load_model_config(context.teacher)
    kept = context.folder("selection").load_json(SCORES, Kept)["attention_layers"]
    config = hybrid_config(
        shapes,
        attention_layers=kept,
        rnn_mixer=context.config.rnn_mixer,
        **context.config.architecture.switches(),
    )
    form = logits_form(training, config.vocab_size)
    attention = context.attention["distill"]
    with teacher_of(training, context.teacher, context.split, form, attention["teacher"]) as teacher:
        torch.manual_seed(training.seed)
        mixers = context.folder("align").path / MIXERS_FILE
        student = build_student(context.teacher, config, mixers, placement(context.ds_config, training))
        use_attention(student, attention["student"])
        objective = Distillation(
            student,
            teacher,
            temperature=training.temperature,
            cross_entropy=training.cross_entropy,
            **options_of(training),
        )
        probe = probe_of(context, "distill", objective)
        result = train(objective, training, shards=shards, folder=folder, ds_config=context.ds_config, probe=probe)
    on_rank0(save_hybrid, folder, student, result)


def teacher_of(
    training: Distill, source: Path, split: RankLayout | None, form: LogitsForm, attention: str
) -> AbstractContextManager[TeacherSource]:
    """The teacher, where the settings place it, for as long as the block lasts.

    Args:
        attention: the implementation of its attention.

    Raises:
        UserError: it could not be loaded.
    """
    if training.teacher_placement == "colocated":
        fp8, sharded = training.teacher_fp8, training.teacher_sharded
        model = teacher_model(source, sharded=sharded, fp8=fp8, attention=attention)
        return nullcontext(Teacher(model, form, SequenceGroup(training.sequence_parallel, apart=True)))
    assert split is not None and split.teachers
    micro_batch, _ = split_batch(training)
    order = Order(
        teacher=str(source.resolve()),
        sharded=training.teacher_sharded,
        fp8=training.teacher_fp8,
        form=form,
        attention=attention,
        batch=micro_batch,
        seq_len=training.seq_len,
    )
    return DedicatedTeacher(split, order)


def logits_form(training: Distill, words: int) -> LogitsForm:
    """The form in which the teacher supplies its logits.

    Args:
        words: size of the vocabulary that teacher and student share.

    Raises:
        UserError: `teacher_top_k` is more than that.
    """
    if training.teacher_logits == "top_k" and training.teacher_top_k > words:
        raise UserError(
            f"distill.teacher_top_k = {training.teacher_top_k} is more than the {words} words of the vocabulary: "
            f"set a smaller one, or teacher_logits = full"
        )
    return LogitsForm(
        kind=training.teacher_logits, words=words, top_k=training.teacher_top_k, temperature=training.temperature
    )


def options_of(training: CheckpointedTraining) -> dict[str, Any]:
    """The settings that every objective with a head uses, as arguments. A collective: every rank must call it."""
    return {
        "sequence": SequenceGroup(training.sequence_parallel),
        "activation_checkpointing": training.activation_checkpointing,
        "kept_layers": training.kept_layers,
        "activation_offload": training.activation_offload,
    }


def save_hybrid(folder: StageFolder, student: PreTrainedModel, result: Result) -> None:
    """Write the trained weights as a transformers folder, in one step, and complete the stage."""
    weights: dict[str, Tensor] = {name.removeprefix("student."): w for name, w in result.weights.items()}
    with atomic_folder(folder.path / HYBRID) as partial:
        student.save_pretrained(partial, state_dict=weights)
    folder.complete(folder.files_in(HYBRID), result.summary())
