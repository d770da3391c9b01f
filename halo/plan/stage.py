"""What a training stage will take on a cluster: memory a GPU, time, disk. Before it is queued, on any machine.

Memory is counted as the code takes it: a layer's activations from a dry run of the layer itself (halo/plan/dry_run.py),
what ZeRO holds from how DeepSpeed 0.19 lays it out. Time is, for each operation, the longer of computing and moving,
and for the ranks' exchange its bytes over the links, as far as computation does not hide it. Each assumption is a
constant below with its source, so that a measurement can correct it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from halo.config import Config, Training
from halo.errors import UserError
from halo.graph import STAGES
from halo.parallel.sequence import check_degree
from halo.plan.dry_run import Work
from halo.plan.load import BF16, Load, Models, load_of
from halo.training.engine import ALONE, split_batch
from halo.training.gpus import GPU

GIB = 2**30
PARTS = (
    *("parameters", "optimizer", "gradients", "made in forward", "step's buffers", "teacher"),
    *("activations", "one layer", "loss", "gathered", "buckets"),
)
"""What a GPU's memory holds, in the order in which it is shown."""

# Rates, as shares of the data sheets'.
REACHED = 0.81
"""Of a GPU's bf16 peak, by a large product: 800 of 989 TFLOP/s on an H100 (measured)."""
PRODUCTS = 0.93
"""Of that, by these models' products: 92 TFLOP in 120 ms in a step of stage 2 of 1.7B on an H200 (measured), which is
0.96; larger models keep the GPU hotter and its clock lower (assumed)."""
ATTENTION = 0.58
"""Of the peak, by flash attention: 580 TFLOP/s forward and backward at 16K on an H200 (measured)."""
KERNELS = 0.8
"""Of the memory's bandwidth, by fused kernels: 0.95 by stage 2's loss on an H200 (measured)."""
BANDWIDTH = 0.4
"""Of it, by torch's other operations: 130 GB in 67 ms in that step of stage 2 (measured)."""
LINK = 0.6
"""Of the links of a node: an all-gather receives 270 of 450 GB/s on two H200s (measured)."""
NETWORK = 0.8
"""Of the network between nodes (assumed)."""
HIDDEN = 0.7
"""Of the exchange within a step, what computation hides where there is enough of it (assumed)."""
DISPATCH = 12e-6
"""Seconds the host takes to issue an operation: a small model waits for them, not for the GPU. With STEP, nearly what
the embedded teacher's pretraining took on an H200: 85 ms a step (measured)."""
STEP = 0.025
"""Seconds of a step in which the GPU waits for the host: 250 ms, of which it worked 212, in stage 2 of 1.7B on an H100,
the rest in small pieces between kernels (measured)."""
HOST_BANDWIDTH = 20e9
"""Bytes/s that a rank moves where its optimizer is on the host (assumed)."""

# Memory beside the tensors that are counted, in bytes.
CONTEXT = 1.0 * GIB
"""CUDA's context, kernels, cuBLAS's workspaces (assumed)."""
NCCL = 1.0 * GIB
"""NCCL's buffers, where there is more than one rank (assumed)."""
FRAGMENTATION = 0.05
"""What torch's allocator holds beyond what is allocated, as a share of it (assumed)."""

# Bytes a parameter.
OPTIMIZER_STATE = 12
"""fp32 weight and two fp32 moments."""
STEP_BUFFERS = 6
"""While the optimizer steps: the gradient flattened, and in fp32."""
STEP_MOVED = 56
"""Moved around the optimizer's step, at the rate of kernels: gradients into buckets and out, their norm, flattening,
widening, AdamW, bf16 copies. 40 ms for 1.93B parameters on an H100 (measured)."""
HOST_STEP_MOVED = 34
"""The same on the host: AdamW, and gradient and weight across the bus."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    gpu: GPU
    nodes: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def without(self, ranks: int) -> "Cluster":
        """The ranks that are left on each node where others are a dedicated teacher's.

        Raises:
            UserError: none is left.
        """
        if ranks >= self.gpus_per_node:
            raise UserError(f"{ranks} ranks of the teacher leave no student among the {self.gpus_per_node} of a node")
        return replace(self, gpus_per_node=self.gpus_per_node - ranks)

    def exchange(self, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes over all ranks."""
        network = self.gpus_per_node * self.gpu.network * NETWORK
        across = size * (self.nodes - 1) / self.nodes / network
        within = size * (self.ranks - 1) / self.ranks / (self.gpu.link * LINK) if self.gpus_per_node > 1 else 0.0
        return max(across, within)

    def gather_in_node(self, size: float) -> float:
        """Seconds of an all-gather of `size` bytes over the ranks of a node."""
        return size * (self.gpus_per_node - 1) / self.gpus_per_node / (self.gpu.link * LINK)

    def seconds(self, work: Work) -> float:
        """Of work on a GPU: for each operation the longer of computing and moving; at least what issuing them takes."""
        products = (self.gpu.reached or self.gpu.peak * REACHED) * PRODUCTS
        rates = {"product": products, "attention": self.gpu.peak * ATTENTION}
        shares = {"other": BANDWIDTH}
        device = sum(
            max(op.flops / rates.get(op.kind, products), op.moved / (self.gpu.bandwidth * shares.get(op.kind, KERNELS)))
            for op in work.operations
        )
        return max(device, work.dispatched * DISPATCH)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What DeepSpeed's JSON says of memory and communication. Sizes are numbers of elements."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    contiguous: bool = True
    """Whether gradients are copied into memory of all of them as soon as the first is there (ZeRO-1 and 2)."""
    prefetch: int = 50_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000

    @classmethod
    def read(cls, ds_config: Mapping[str, Any], ranks: int) -> "Zero":
        """A DeepSpeed configuration, with DeepSpeed's own defaults, as so many ranks run it.

        Raises:
            UserError: there is no such ZeRO stage.
        """
        zero = ds_config.get("zero_optimization", {}) | (ALONE if ranks == 1 else {})
        stage = zero.get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise UserError(f"the DeepSpeed config says zero_optimization.stage = {stage}: it is 0, 1, 2 or 3")

        def offloads(what: str) -> bool:
            return (zero.get(what) or {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            contiguous=bool(zero.get("contiguous_gradients", True)) or stage == 3 or offloads("offload_optimizer"),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", cls.max_reuse)),
            sub_group=int(zero.get("sub_group_size", cls.sub_group)),
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What one can choose for a stage."""

    training: Training
    cluster: Cluster
    zero: Zero


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage will take."""

    stage: str
    setup: Setup
    micro_batch: int
    accumulation: int
    load: Load
    moment: str
    """When memory is fullest."""
    memory: Mapping[str, float]
    """Bytes on a GPU then, by part."""
    time: Mapping[str, float]
    """Seconds of a step, by part."""

    @property
    def allocated(self) -> float:
        """The most bytes that torch allocates: `peak_gib` of metrics.jsonl."""
        return sum(self.memory.values())

    @property
    def allowance(self) -> float:
        """Bytes beside them: context, NCCL, fragmentation."""
        return CONTEXT + NCCL * (self.setup.cluster.ranks > 1) + FRAGMENTATION * self.allocated

    @property
    def needed(self) -> float:
        return self.allocated + self.allowance

    @property
    def host(self) -> float:
        """Bytes of a node's own memory that offloading takes: the optimizer, its gradients, and the weights."""
        zero, cluster = self.setup.zero, self.setup.cluster
        held = (OPTIMIZER_STATE + STEP_BUFFERS) * zero.offload_optimizer + BF16 * zero.offload_parameters
        return held * self.load.parameters / cluster.ranks * cluster.gpus_per_node

    @property
    def fits(self) -> bool:
        return self.needed <= self.setup.cluster.gpu.memory * GIB

    @property
    def seconds(self) -> float:
        """Of a step."""
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
        return self.seconds * self.setup.training.steps * self.setup.cluster.ranks / 3600

    @property
    def checkpoint(self) -> int:
        """Bytes on disk: the optimizer's state, and below ZeRO-3 the bf16 weights too."""
        return self.load.parameters * (OPTIMIZER_STATE + BF16 * (self.setup.zero.stage < 3))


def plan_stage(models: Models, stage: str, setup: Setup) -> StagePlan:
    """Plan a stage that trains.

    Raises:
        UserError: the ranks do not divide the batch, or cannot share its sequences, or a dedicated teacher takes all
            of a node.
    """
    training = setup.training
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
    moments = _moments(load, students, accumulation)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return StagePlan(
        stage=stage,
        setup=setup,
        micro_batch=micro_batch,
        accumulation=accumulation,
        load=load,
        moment=moment,
        memory=moments[moment],
        time=_time(load, students, accumulation),
    )


def stages_of(config: Config) -> list[str]:
    """The stages that train, in order, as far as a preset has them."""
    return [stage.name for stage in STAGES.values() if stage.trains and getattr(config, stage.name) is not None]


def _moments(load: Load, setup: Setup, accumulation: int) -> dict[str, dict[str, float]]:
    """Bytes on a GPU by part, at each of the moments at which memory can be fullest."""
    n, zero, cluster = load.parameters, setup.zero, setup.cluster
    partition, sharded, accumulates = n / cluster.ranks, zero.stage == 3, accumulation > 1
    state = {
        "parameters": BF16 * (partition if sharded else n) * (not zero.offload_parameters),
        "optimizer": OPTIMIZER_STATE * (partition if zero.stage else n) * (not zero.offload_optimizer),
        "teacher": _teacher_bytes(load, cluster),
    }
    # What ZeRO-1 and 2 reduce is kept for this rank's partition; ZeRO-1 adds up whole gradients before.
    reduced = {0: n, 1: n if accumulates else partition, 2: partition * (1 + accumulates), 3: partition}[zero.stage]
    gradients = BF16 * reduced * (not zero.offload_optimizer)
    before_backward = gradients * (accumulates or sharded)
    # Kept whole until backward ends: of a head that is tied, or (without accumulation) too large for a bucket.
    head = BF16 * load.head
    alone = zero.stage < 2 and not accumulates and load.head > zero.reduce_bucket
    of_head = head * (load.tied or alone)
    buckets = (
        zero.contiguous
        * BF16
        * zero.reduce_bucket
        * (1 + ((zero.overlap and cluster.ranks > 1) or sharded))
        * (zero.stage > 0)
    )
    static = buckets / 2 * sharded  # ZeRO-3's are there always, but for the copy that is reduced
    # A parameter group, which is a layer, is stepped after the other.
    group = load.group or max(load.head, *(layer.parameters for layer in load.layers))
    stepped = min(group / cluster.ranks, zero.sub_group) if sharded else group / (cluster.ranks if zero.stage else 1)

    external, behind_loss, beside_layer = _gathered(load, setup)
    activations, one_layer, freed = _activations(load, zero)
    loss = load.loss_held + max(load.loss_chunk, head * (behind_loss > 0 and not load.tied))
    layer = {"one layer": one_layer, "made in forward": load.made, "gathered": beside_layer}
    moments: dict[str, dict[str, float]] = {
        "building the engine": {"parameters": BF16 * n * (1 if sharded else 2), "optimizer": 0.0},
        "a layer's backward": layer
        | {"activations": activations, "gradients": before_backward + of_head}
        | {"buckets": static if load.made else buckets},
        "the exchange of gradients": {"made in forward": load.made, "gradients": gradients}
        | {"gathered": external, "buckets": buckets},
        "the optimizer's step": {"gradients": gradients, "buckets": static}
        | {"step's buffers": STEP_BUFFERS * stepped * (not zero.offload_optimizer)},
    }
    if load.head:
        moments["the loss"] = {"loss": loss, "activations": activations, "gathered": behind_loss} | {
            "gradients": before_backward,
            "buckets": static,
        }
        if zero.contiguous:
            moments["the first gradients' exchange"] = layer | {
                "activations": activations - freed,
                "gradients": gradients + of_head,
                "buckets": buckets,
            }
        else:
            moments["the first layer's backward"] = layer | {"gradients": gradients}
    return {name: _ordered(state | parts) for name, parts in moments.items()}


def _ordered(parts: dict[str, float]) -> dict[str, float]:
    return {name: parts[name] for name in PARTS if name in parts}


def _teacher_bytes(load: Load, cluster: Cluster) -> float:
    if load.teacher is None:
        return 0.0
    if load.teacher.ranks:
        return BF16 * load.teacher.head
    cut = load.teacher.in_layers if load.teacher.sharded else 0
    return BF16 * (load.teacher.parameters - cut + cut / cluster.gpus_per_node)


def _gathered(load: Load, setup: Setup) -> tuple[float, float, float]:
    """Bytes of whole weights under ZeRO-3: those kept from forward to the step; all during the loss; in a layer."""
    zero = setup.zero
    if zero.stage < 3 or setup.cluster.ranks == 1:
        return 0.0, 0.0, 0.0
    external = BF16 * load.external
    if load.made:
        return external, external, external
    # The last layers stay gathered from forward to backward: they are used again soon.
    stay = min(zero.max_reuse / 2, sum(layer.count * layer.parameters for layer in load.layers))
    largest = max(layer.parameters for layer in load.layers)
    return external, external + BF16 * stay, external + BF16 * max(stay, largest + zero.prefetch)


def _activations(load: Load, zero: Zero) -> tuple[float, float, float]:
    """Bytes that layers keep for backward; that one layer's backward adds; that are free when a bucket is full."""
    costs = [layer.cost for layer in load.layers]
    if load.one_at_a_time:
        inputs = sum(layer.count * layer.input_bytes for layer in load.layers)
        return load.held + inputs, max(cost.peak for cost in costs), 0.0
    kept = sum(layer.count * layer.cost.kept for layer in load.layers)
    layers = zero.reduce_bucket // max(layer.parameters for layer in load.layers)
    freed = min(kept, layers * max(cost.kept for cost in costs))
    return load.held + kept, max(cost.peak - cost.kept for cost in costs), freed


def _time(load: Load, setup: Setup, accumulation: int) -> dict[str, float]:
    """Seconds of a step, by part."""
    cluster, zero = setup.cluster, setup.zero
    weights = BF16 * load.parameters
    teacher = cluster.seconds(load.teacher.work) if load.teacher else 0.0
    beside = load.teacher is not None and load.teacher.ranks > 0
    student = 0.0
    for layer in load.layers:
        forward, backward = cluster.seconds(layer.cost.forward), cluster.seconds(layer.cost.backward)
        student += layer.count * (forward * (1 + load.recomputes) + backward)
    loss = cluster.seconds(load.loss)

    # ZeRO-3 gathers for forward and for backward; ZeRO-1 and 2 reduce by an all-reduce, which is twice the bytes.
    exchanges = {0: 2, 1: 2, 2: 2 * accumulation, 3: 3 * accumulation}[zero.stage]
    exchange = exchanges * cluster.exchange(weights)
    if zero.offload_parameters:
        exchange += 2 * accumulation * weights / cluster.ranks / HOST_BANDWIDTH
    if load.teacher and load.teacher.sharded and not beside:
        exchange += accumulation * cluster.gather_in_node(BF16 * load.teacher.in_layers)
    compute = accumulation * (teacher * (not beside) + student + loss)

    partition = load.parameters / (cluster.ranks if zero.stage else 1)
    if zero.offload_optimizer:
        optimizer = partition * HOST_STEP_MOVED / HOST_BANDWIDTH
    else:
        optimizer = partition * STEP_MOVED / (cluster.gpu.bandwidth * KERNELS)
    if zero.stage in (1, 2):
        optimizer += cluster.exchange(weights)
    time = {
        "teacher": accumulation * teacher,
        "layers": accumulation * student,
        "loss": accumulation * loss,
        "exchange not hidden": max(exchange - compute, (1 - HIDDEN) * exchange),
        "optimizer": optimizer,
        "host": STEP,
    }
    if load.teacher and beside:  # the students wait only where it takes longer for them all than they do
        asked = math.ceil(cluster.gpus_per_node / load.teacher.ranks)
        own = sum(time.values()) - time["teacher"]
        time["teacher"] = max(0.0, asked * time["teacher"] - own)
    return time
