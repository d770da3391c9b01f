"""Stage 2: the hybrid, whole for the first time, learns the teacher's distribution end to end (Eq. 10).

Writes `hybrid/`: the model as transformers saves it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halo.config import Distill
from halo.context import Context
from halo.dedicated import DedicatedTeacher, Order
from halo.distributed import on_rank0
from halo.engine import split_batch
from halo.errors import UserError
from halo.models import load_teacher
from halo.objectives import Distillation
from halo.run import StageFolder, atomic_folder
from halo.stages.align import load_mixers
from halo.stages.data import shards_for
from halo.teacher import Teacher
from halo.teacher_logits import LogitsForm
from halo.trainer import Result, train
from hypenet.transfer import hybrid_config, hybrid_from_teacher

HYBRID = "hybrid"


def run(context: Context) -> None:
    folder, training = context.folder("distill"), context.config.distill
    shards = shards_for(context, "distill")
    source = load_teacher(context.teacher)
    kept = context.folder("selection").load_json("scores.json")["attention_layers"]
    config = hybrid_config(
        source.config,
        attention_layers=kept,
        rnn_mixer=context.config.rnn_mixer,
        **context.config.architecture.switches(),
    )
    torch.manual_seed(training.seed)
    student = hybrid_from_teacher(source, config, load_mixers(context.folder("align")))
    with teacher_of(context, source, student) as teacher:
        del source
        objective = Distillation(
            student,
            teacher,
            temperature=training.temperature,
            cross_entropy=training.cross_entropy,
            activation_checkpointing=training.activation_checkpointing,
        )
        result = train(objective, training, shards=shards, folder=folder, ds_config=context.ds_config)
    on_rank0(lambda: save_hybrid(folder, student, result))


def teacher_of(
    context: Context, model: PreTrainedModel, student: PreTrainedModel
) -> AbstractContextManager[Teacher | DedicatedTeacher]:
    """The teacher where the settings place it, for as long as it is asked.

    Args:
        model: the whole teacher, for one that is on this rank.

    Raises:
        UserError: the settings ask for more of its logits than there are; or other ranks could not load it.
    """
    training = context.config.distill
    form = logits_form(training, min(model.config.vocab_size, student.config.vocab_size))
    if training.teacher_placement == "colocated":
        return nullcontext(Teacher(model, sharded=training.teacher_sharded, form=form))
    assert context.split is not None and context.split.teachers
    micro_batch, _ = split_batch(training)
    order = Order(
        teacher=str(context.teacher.resolve()),
        sharded=training.teacher_sharded,
        form=form,
        batch=micro_batch,
        seq_len=training.seq_len,
    )
    return DedicatedTeacher(context.split, order)


def logits_form(training: Distill, words: int) -> LogitsForm:
    """The form in which the teacher supplies its logits, of the `words` that teacher and student both have.

    Raises:
        UserError: it is to supply more of them than there are.
    """
    if training.teacher_logits == "top_k" and training.teacher_top_k > words:
        raise UserError(
            f"distill.teacher_top_k = {training.teacher_top_k} is more than the {words} words of the vocabulary: "
            f"take fewer, or teacher_logits = full"
        )
    return LogitsForm(
        kind=training.teacher_logits, words=words, top_k=training.teacher_top_k, temperature=training.temperature
    )


def save_hybrid(folder: StageFolder, student: PreTrainedModel, result: Result) -> None:
    """Write the trained weights as a transformers folder, in one step, and complete the stage."""
    weights: dict[str, Tensor] = {name.removeprefix("student."): w for name, w in result.weights.items()}
    with atomic_folder(folder.path / HYBRID) as partial:
        student.save_pretrained(partial, state_dict=weights)
    folder.complete(folder.files_in(HYBRID), result.summary())
