"""What a training stage will need on a cluster: memory per GPU, time, disk. Before it is queued, on any machine.

Memory is counted as the code allocates it: a layer's activations from a dry run of the layer itself
(halo/plan/dry_run.py), ZeRO's part from how DeepSpeed 0.19 lays it out. halo/plan/assumptions.py has every assumption.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from halo.config import Config, Distill
from halo.errors import UserError
from halo.graph import STAGES
from halo.parallel.activations import MARGIN
from halo.parallel.checks import check_degree
from halo.plan.assumptions import BF16, CONTEXT, FRAGMENTATION, GIB, NCCL, OPTIMIZER_STATE, STEP_BUFFERS
from halo.plan.cluster import Setup
from halo.plan.load import Load, Models, load_of
from halo.plan.memory import memory_by_moment
from halo.plan.timing import probe_time, step_time
from halo.teacher.fp8 import check_fp8_widths
from halo.training.engine import split_batch


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage will need."""

    stage: str
    setup: Setup
    micro_batch: int
    accumulation: int
    load: Load
    moment: str
    """The moment at which memory is fullest."""
    memory: Mapping[str, float]
    """Bytes on a GPU then, by part."""
    time: Mapping[str, float]
    """Seconds of a step, by part."""
    probe: float
    """Seconds of an evaluation amid training; 0: there is none."""

    @property
    def allocated(self) -> float:
        """The most bytes that torch allocates: `peak_gib` of metrics.jsonl."""
        return sum(self.memory.values())

    @property
    def allowance(self) -> float:
        """Bytes beside the allocated ones: context, NCCL, fragmentation."""
        return CONTEXT + NCCL * (self.setup.cluster.ranks > 1) + FRAGMENTATION * self.allocated

    @property
    def needed(self) -> float:
        return self.allocated + self.allowance

    @property
    def host(self) -> float:
        """Bytes of a node's host memory that offloading needs: the optimizer, its gradients, and the weights."""
        zero, cluster = self.setup.zero, self.setup.cluster
        held = (OPTIMIZER_STATE + STEP_BUFFERS) * zero.offload_optimizer + BF16 * zero.offload_parameters
        return held * self.load.parameters / cluster.ranks * cluster.gpus_per_node

    @property
    def fits(self) -> bool:
        return self.needed <= self.setup.cluster.gpu.memory * GIB

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.time.values())

    @property
    def tokens_per_second(self) -> float:
        return self.setup.training.batch * self.setup.training.seq_len / self.seconds

    @property
    def mfu(self) -> float:
        cluster = self.setup.cluster
        return self.tokens_per_second * self.load.flops_per_token / (cluster.gpu.peak * cluster.ranks)

    @property
    def gpu_hours(self) -> float:
        training = self.setup.training
        every = getattr(training, "probe_every", 0)
        probes = -(-training.steps // every) if every else 0
        return (self.seconds * training.steps + self.probe * probes) * self.setup.cluster.ranks / 3600

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: the optimizer's state, and with ZeRO-1 and 2 the bf16 weights too."""
        return self.load.parameters * (OPTIMIZER_STATE + BF16 * (self.setup.zero.stage < 3))


def plan_stage(models: Models, stage: str, setup: Setup) -> StagePlan:
    """Plan a stage that trains.

    Raises:
        UserError: the ranks do not divide the batch, or cannot share its sequences, or a dedicated teacher needs all
            ranks of a node, or the teacher cannot run in FP8.
    """
    training = setup.training
    if isinstance(training, Distill) and training.teacher_fp8:
        _check_fp8(models, setup)
    check_degree(
        f"{stage}.sequence_parallel",
        training.sequence_parallel,
        seq_len=training.seq_len,
        ranks=setup.cluster.ranks,
        mixers=[models.mixers[0], *(layer.get_submodule("self_attn") for layer in models.hybrid.model.layers)],
    )
    students = replace(setup, cluster=setup.cluster.without(getattr(setup.training, "teacher_ranks", 0)))
    micro_batch, accumulation = split_batch(setup.training, students.cluster.ranks)
    load = load_of(models, stage, setup.training, micro_batch)
    if load.checkpoints and getattr(setup.training, "kept_layers", 0) == -1:
        load = replace(load, kept=_layers_that_fit(load, students, accumulation))
    moments = memory_by_moment(load, students, accumulation)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return StagePlan(
        stage=stage,
        setup=setup,
        micro_batch=micro_batch,
        accumulation=accumulation,
        load=load,
        moment=moment,
        memory=moments[moment],
        time=step_time(load, students, accumulation),
        probe=probe_time(load, students, accumulation),
    )


def _check_fp8(models: Models, setup: Setup) -> None:
    if not setup.cluster.gpu.fp8:
        raise UserError(f"distill.teacher_fp8: {setup.cluster.gpu.device} has no FP8 products: set it to false")
    check_fp8_widths(models.teacher.model.layers)


def _layers_that_fit(load: Load, setup: Setup, accumulation: int) -> int:
    """How many layers keep their activations, as training will find out (`halo.parallel.activations.KeptLayers`)."""
    needed = max(sum(parts.values()) for parts in memory_by_moment(load, setup, accumulation).values())
    cluster = setup.cluster
    room = cluster.gpu.memory * GIB * (1 - MARGIN) - CONTEXT - NCCL * (cluster.ranks > 1) - needed
    each = max(layer.cost.kept - layer.checkpointed.kept for layer in load.layers if layer.checkpointed is not None)
    return max(0, min(load.depth, int(room // each)))


def stages_of(config: Config) -> list[str]:
    """The stages that train, in order, as far as a preset has them."""
    return [stage.name for stage in STAGES.values() if stage.trains and getattr(config, stage.name) is not None]
