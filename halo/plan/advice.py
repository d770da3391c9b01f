"""What to change in a setup so that it fits or, if it does, so that it is faster."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from halo.config import CheckpointedTraining, Distill
from halo.errors import UserError
from halo.plan.assumptions import GIB
from halo.plan.cluster import Setup
from halo.plan.load import Models
from halo.plan.stage import StagePlan, plan_stage

ROOM = 0.95
"""How full a GPU may be for a faster setup to be recommended."""
WORTHWHILE = 0.95
"""A faster setup must need less than this share of the time."""

Change = Callable[[str, Setup], Setup | None]
"""(stage, setup) -> the changed setup, or None if it does not apply."""


def advice(models: Models, plan: StagePlan) -> str:
    """One line, with options of the command line. Empty: nothing to gain."""
    return _to_be_faster(models, plan) if plan.fits else _to_fit(models, plan)


def _to_be_faster(models: Models, plan: StagePlan) -> str:
    room = ROOM * plan.setup.cluster.gpu.memory * GIB
    faster = [
        other
        for other in _changed(models, plan, FASTER)
        if other.needed <= room and other.seconds < WORTHWHILE * plan.seconds
    ]
    if not faster:
        return ""
    best = min(faster, key=lambda other: other.seconds)
    return f"faster by {plan.seconds / best.seconds - 1:.0%}, at {_gib(best)}: {_difference(plan, best)}"


def _to_fit(models: Models, plan: StagePlan) -> str:
    """One setting that suffices; else settings added one after the other, then more nodes, then offloading."""
    for other in _changed(models, plan, SMALLER):
        if other.fits:
            return f"{_difference(plan, other)} would make it fit, in {_gib(other)}"
    smaller = plan
    for change in [*SMALLER, *LARGER]:
        for other in _changed(models, smaller, [change]):
            if other.needed < smaller.needed:
                smaller = other
        if smaller.fits:
            return f"{_difference(plan, smaller)} would make it fit, in {_gib(smaller)}"
    if smaller is plan:
        return "no setting of this stage makes it smaller: take larger GPUs"
    return f"even {_difference(plan, smaller)} needs {_gib(smaller)}: take larger GPUs"


def _changed(models: Models, plan: StagePlan, changes: Sequence[Change]) -> Iterator[StagePlan]:
    """The plans of the changed setups that can run."""
    for change in changes:
        setup = change(plan.stage, plan.setup)
        if setup is not None and setup != plan.setup:
            try:
                yield plan_stage(models, plan.stage, setup)
            except UserError:  # these ranks do not divide the batch
                continue


def _difference(old: StagePlan, new: StagePlan) -> str:
    """The options to type for `new` in place of `old`."""
    words, before, after = [], old.setup, new.setup
    settings = ("activation_checkpointing", "activation_offload", "kept_layers", "teacher_sharded", "micro_batch")
    for name in settings:
        value = getattr(after.training, name, None)
        if value != getattr(before.training, name, None):
            words.append(f"--{old.stage}.{name} {str(value).lower()}")
    if after.zero != before.zero:
        offload = "_offload" if after.zero.offload_optimizer else ""
        words.append(f"--ds_config ds_configs/zero{after.zero.stage}{offload}.json")
    if after.cluster != before.cluster:
        words.append(f"--nodes {after.cluster.nodes}")
    return " ".join(words)


def _gib(plan: StagePlan) -> str:
    return f"{plan.needed / GIB:.1f} GiB"


def _checkpoint_layers(*, checkpointing: bool, offload: bool = False) -> Change:
    def change(stage: str, setup: Setup) -> Setup | None:
        if not isinstance(setup.training, CheckpointedTraining):
            return None
        training = replace(
            setup.training, activation_checkpointing=checkpointing, activation_offload=offload, kept_layers=-1
        )
        return replace(setup, training=training)

    return change


def _teacher_sharded(value: bool) -> Change:
    """Only for a teacher beside the student: one on other GPUs needs no memory here. In FP8 it cannot be sharded."""

    def change(stage: str, setup: Setup) -> Setup | None:
        training = setup.training
        if not isinstance(training, Distill) or training.teacher_placement != "colocated" or training.teacher_fp8:
            return None
        return replace(setup, training=replace(training, teacher_sharded=value))

    return change


def _micro_batch(factor: float) -> Change:
    def change(stage: str, setup: Setup) -> Setup | None:
        share = setup.training.batch // setup.cluster.ranks
        size = int(min(setup.training.micro_batch, share) * factor)
        if not 1 <= size <= share:
            return None
        return replace(setup, training=replace(setup.training, micro_batch=size))

    return change


def _zero(stage: int, offload: bool = False) -> Change:
    def change(_: str, setup: Setup) -> Setup:
        return replace(
            setup, zero=replace(setup.zero, stage=stage, offload_optimizer=offload, offload_parameters=offload)
        )

    return change


def _nodes(factor: int) -> Change:
    def change(_: str, setup: Setup) -> Setup:
        return replace(setup, cluster=replace(setup.cluster, nodes=setup.cluster.nodes * factor))

    return change


SMALLER: list[Change] = [
    _checkpoint_layers(checkpointing=True),
    _teacher_sharded(True),
    *(_micro_batch(1 / 2**i) for i in range(1, 6)),
    _zero(2),
    _zero(3),
    _checkpoint_layers(checkpointing=True, offload=True),
]
"""Settings that need less memory, cheapest first."""
LARGER: list[Change] = [*(_nodes(factor) for factor in (2, 2, 2)), _zero(3, offload=True)]
"""The costlier ones, after them."""
FASTER: list[Change] = [
    _checkpoint_layers(checkpointing=False),
    _checkpoint_layers(checkpointing=True),
    _teacher_sharded(False),
    *(_micro_batch(2**i) for i in range(1, 4)),
    *(_zero(stage) for stage in (1, 2, 3)),
]
