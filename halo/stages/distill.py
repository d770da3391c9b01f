"""Stage 2: the hybrid, whole for the first time, learns the teacher's distribution end to end (Eq. 10).

Writes `hybrid/`: the model as transformers saves it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halo.build import build_student, build_teacher
from halo.context import Context
from halo.distributed import on_rank0
from halo.engine import placement
from halo.objectives import Distillation
from halo.run import StageFolder, atomic_folder
from halo.stages.align import MIXERS
from halo.stages.data import shards_for
from halo.teacher import Teacher, teacher_group
from halo.trainer import Result, train
from hypenet.transfer import hybrid_config

HYBRID = "hybrid"


def run(context: Context) -> None:
    folder, training = context.folder("distill"), context.config.distill
    shards = shards_for(context, "distill")
    teacher = build_teacher(context.teacher, teacher_group(training.teacher_placement))
    kept = context.folder("selection").load_json("scores.json")["attention_layers"]
    config = hybrid_config(
        teacher.config,
        attention_layers=kept,
        rnn_mixer=context.config.rnn_mixer,
        **context.config.architecture.switches(),
    )
    torch.manual_seed(training.seed)
    mixers = context.folder("align").path / MIXERS
    student = build_student(context.teacher, config, mixers, placement(context.ds_config, training))
    objective = Distillation(
        student,
        Teacher(teacher, training.teacher_placement),
        temperature=training.temperature,
        cross_entropy=training.cross_entropy,
        activation_checkpointing=training.activation_checkpointing,
    )
    result = train(objective, training, shards=shards, folder=folder, ds_config=context.ds_config)
    on_rank0(lambda: save_hybrid(folder, student, result))


def save_hybrid(folder: StageFolder, student: PreTrainedModel, result: Result) -> None:
    """Write the trained weights as a transformers folder, in one step, and complete the stage."""
    weights: dict[str, Tensor] = {name.removeprefix("student."): w for name, w in result.weights.items()}
    with atomic_folder(folder.path / HYBRID) as partial:
        student.save_pretrained(partial, state_dict=weights)
    folder.complete(folder.files_in(HYBRID), result.summary())
