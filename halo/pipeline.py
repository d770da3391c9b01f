"""From a command line to finished stages: check everything on rank 0, then run what is missing, in order."""

import time
from collections.abc import Callable
from dataclasses import replace

from halo.config import Training
from halo.context import Context
from halo.distributed import on_rank0, rank, world_size
from halo.errors import UserError
from halo.graph import stages_to
from halo.job import Job
from halo.models.build import check_teacher
from halo.models.loading import check_architecture, find_teacher
from halo.parallel.checks import check_sequence_parallel
from halo.run import claim, recorded_config, teacher_fingerprint
from halo.stages import align, csr, distill, export, finetune, niah, scaling, selection
from halo.tables import suggest
from halo.training.engine import complete_ds_config, read_ds_config
from hypenet.configuration_hypenet import ATTENTION
from hypenet.mixers import MIXERS

STAGES: dict[str, Callable[[Context], None]] = {
    "align": align.run,
    "selection": selection.run,
    "distill": distill.run,
    "finetune": finetune.run,
    "scaling": scaling.run,
    "export": export.run,
    "niah": niah.run,
    "csr": csr.run,
}


def run_stage(job: Job, stage: str) -> Context:
    """Run `stage`; with `job.prepare`, first every stage before it that is missing.

    Raises:
        UserError: bad settings, teacher or folder, or a missing predecessor; on every rank, before anything is written.
    """
    names = stages_to(stage, job.prepare)
    # The store in `split` is each rank's own.
    context = replace(on_rank0(lambda: _open(job, stage, names)), split=job.split)
    with recorded_config(job.run, job.config):
        for name in names:
            if on_rank0(lambda name=name: context.is_complete(name)):  # type: ignore[misc]
                say(f"{name}: done already, in {context.run / name}")
                continue
            if name != stage:
                say(f"{name}: missing, preparing it for {stage}")
            began = time.perf_counter()
            STAGES[name](context)
            say(f"{name}: {time.perf_counter() - began:.0f} s -> {context.run / name}")
    return context


def say(line: str) -> None:
    """One line of plain words, from rank 0."""
    if rank() == 0:
        print(line, flush=True)


def _open(job: Job, stage: str, names: list[str]) -> Context:
    """Every check that needs no model. Writes nothing but what is fetched from the hub."""
    ds_config = read_ds_config(job.ds_config)
    mixer, mixers = job.config.rnn_mixer, sorted(MIXERS.keys() - {ATTENTION})
    if mixer not in mixers:
        raise UserError(f"no RNN mixer '{mixer}'{suggest(mixer, mixers)}; there are: {', '.join(mixers)}")
    for name in names:
        training = getattr(job.config, name, None)
        if isinstance(training, Training) and world_size() % training.sequence_parallel == 0:  # else refused below
            complete_ds_config(ds_config, training)
    claim(job.run, job.config)
    teacher = find_teacher(job.config.teacher)
    check_architecture(teacher, job.config)
    for name in names:
        if hasattr(getattr(job.config, name, None), "sequence_parallel"):
            check_sequence_parallel(teacher, job.config, name, world_size())
    check_teacher(teacher)
    context = Context(
        config=job.config,
        run=job.run,
        teacher=teacher,
        fingerprint=teacher_fingerprint(teacher),
        ds_config=ds_config,
    )
    if not job.prepare:
        context.require_inputs(stage)
    done = {name: context.is_complete(name) for name in names}  # refuses what was made from something else
    if not done.get("csr", True):
        csr.load_tasks(job.config.csr)
    return context
