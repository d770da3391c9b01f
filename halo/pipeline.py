"""From a command line to finished stages: check everything on rank 0, then run what is missing, in order."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from halo.config import Training
from halo.context import Context
from halo.data.contents import contents_of
from halo.data.locks import RunLock
from halo.distributed import on_rank0, say, world_size
from halo.errors import UserError
from halo.graph import STAGES
from halo.job import Job
from halo.models.attention import attention_of_stage, check_attention, said_of
from halo.models.build import check_teacher
from halo.models.folders import weight_files
from halo.models.generation import GENERATION
from halo.models.gguf import is_gguf
from halo.models.loading import check_architecture, find_teacher, load_model_config
from halo.models.rehearsal import rehearse
from halo.models.tokenizer import load_tokenizer, tokenizer_digest
from halo.parallel.checks import check_sequence_parallel
from halo.run import StageFolder, claim, content_digest, recorded_config
from halo.tables import suggest
from halo.taking import take, with_taken
from halo.training.engine import complete_ds_config, read_ds_config
from hypenet.configuration_hypenet import ATTENTION
from hypenet.mixers import MIXERS


def run_stages(job: Job) -> Context:
    """Run those of `job.stages` that are missing, in their order and in one group of ranks.

    Raises:
        UserError: bad settings, teacher or folder, a missing predecessor, or another command that works on the run; on
            every rank, before anything is written.
    """
    context = on_rank0(_open, job)
    idle = on_rank0(_is_done, context, job.stages)
    with nullcontext() if idle else _alone(job.run), recorded_config(job.run, job.config):
        if job.remembered:
            say(job.remembered)
        on_rank0(_remove_leftovers, context)
        taken = context.taken
        # The store in `split` is each rank's own.
        context = replace(on_rank0(take, context), split=job.split)
        for name in taken:
            say(f"{name}: taken from {job.taken_from}")
        told = job.config.attention != "auto"
        for name in job.stages:
            if on_rank0(context.is_complete, name):
                say(on_rank0(_done, context, name))
                continue
            if name != job.stages[-1]:
                say(f"{name}: missing, running it before {job.stages[-1]}")
            if not told and context.attention:
                say(said_of(context.attention))
                told = True
            began = time.perf_counter()
            stage_module(name).run(context)
            say(f"{name}: {time.perf_counter() - began:.0f} s -> {context.run / name}")
    return context


def stage_module(name: str) -> ModuleType:
    """The module of a stage.

    It has `run(context)`, which does the work and completes the stage's folder, on all ranks. It may have
    `check(context)`, on rank 0 before the first stage runs: it raises a UserError where `run` would fail.
    """
    return import_module(f"halo.stages.{name}")


def _is_done(context: Context, names: Sequence[str]) -> bool:
    """Whether there is nothing to do: then a run may be in a folder that is read-only, or in use."""
    return not context.taken and all(context.is_complete(name) for name in names)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder within the block. Every rank must call it."""
    lock = RunLock(run)
    on_rank0(lock.take)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(context: Context) -> None:
    """Remove what a command left behind that was killed as a stage ended."""
    for name in context.verified - context.taken.keys():
        StageFolder(context.run / name, {}).remove_checkpoints()


def _done(context: Context, name: str) -> str:
    other = context.folder(name).record().taken_from
    return f"{name}: done already, in {context.run / name}" + (f", taken from {other}" if other else "")


def _open(job: Job) -> Context:
    """Every check that needs no model. Writes nothing but what is fetched from the hub."""
    ds_config = read_ds_config(job.ds_config)
    check_attention(job.config.attention)
    names = job.stages
    converts = STAGES[names[0]].conversion
    if converts:
        _check_mixer(job.config.rnn_mixer)
    for name in names:
        training = getattr(job.config, name, None)
        if STAGES[name].trains and training is None:
            raise UserError(f"preset '{job.config.name}' has no [{name}] table")
        if isinstance(training, Training) and world_size() % training.sequence_parallel == 0:  # else refused below
            complete_ds_config(ds_config, training)
    claim(job.run, job.config)
    teacher = _find_teacher(job, names) if converts else Path()
    model_config = load_model_config(teacher) if converts else job.config.pretrain
    context = Context(
        config=job.config,
        run=job.run,
        teacher=teacher,
        fingerprint=_fingerprint(job.config.teacher, teacher) if converts else "",
        contents=contents_of(job),
        ds_config=ds_config,
        attention={n: attention_of_stage(job.config, n, model_config) for n in names if STAGES[n].models},
    )
    if job.taken_from is not None:
        context = with_taken(context, job.taken_from, job.taken_stages)
    context.require_inputs(names[0])
    unfinished = [name for name in names if not context.is_complete(name)]  # refuses what was made from something else
    for name in unfinished:
        getattr(stage_module(name), "check", _nothing)(context)
    if converts and unfinished and (unset := rehearse(teacher, job.config)):
        say(f"the teacher's generation settings {', '.join(unset)} have no effect, and its hybrid will not have them")
    return context


def _fingerprint(name: str, folder: Path) -> str:
    """That of the GGUF file of this name, however it was unpacked into `folder`; else of the folder's configurations
    and weights. And of its tokenizer.
    """
    small = [path for known in ("config.json", GENERATION) if (path := folder / known).is_file()]
    files = [Path(name)] if is_gguf(name) else [*small, *weight_files(folder)]
    return content_digest({path.name: path for path in files}, tokenizer_digest(load_tokenizer(folder)))


def _check_mixer(mixer: str) -> None:
    mixers = sorted(MIXERS.keys() - {ATTENTION})
    if mixer not in mixers:
        raise UserError(f"no RNN mixer '{mixer}'{suggest(mixer, mixers)}; there are: {', '.join(mixers)}")


def _find_teacher(job: Job, names: Sequence[str]) -> Path:
    """The teacher's local files, checked without loading them."""
    teacher = find_teacher(job.config.teacher)
    check_architecture(teacher, job.config)
    for name in names:
        if hasattr(getattr(job.config, name, None), "sequence_parallel"):
            check_sequence_parallel(teacher, job.config, name, world_size())
    check_teacher(teacher)
    return teacher


def _nothing(context: Context) -> None:
    """The `check` of a stage that has none."""
