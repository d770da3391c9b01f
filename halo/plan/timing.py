"""What a step's time goes into.

An operation takes the longer of computing and moving; the ranks' exchange its bytes over the links, as far as
computation does not hide it.
"""

import math

from halo.config import CheckpointedTraining
from halo.measuring.probe import PROBED, probed_lengths
from halo.plan.assumptions import (
    BF16,
    CUT_LAYER,
    HIDDEN,
    HOST_BANDWIDTH,
    HOST_STEP_MOVED,
    KERNELS,
    PLAIN_STEP_MOVED,
    RECORDED_STEP,
    STEP,
    STEP_MOVED,
    ZERO3_LAYER,
)
from halo.plan.cluster import Setup
from halo.plan.load import Load
from halo.training.recording import SMALL


def step_time(load: Load, setup: Setup, accumulation: int) -> dict[str, float]:
    """Seconds of a step, by part."""
    cluster, zero = setup.cluster, setup.zero
    weights = BF16 * load.parameters
    recorded = _is_recorded(load, setup, accumulation)
    teacher = cluster.seconds(load.teacher.work, recorded=recorded) if load.teacher else 0.0
    beside = load.teacher is not None and load.teacher.ranks > 0
    student = 0.0
    for layer in load.layers:
        for share, cost in load.costs(layer):
            seconds = [cluster.seconds(work, recorded=recorded) for work in (cost.forward, cost.backward)]
            student += layer.count * share * sum(seconds)
    loss = cluster.seconds(load.loss)

    # ZeRO-3 gathers for forward and for backward; ZeRO-1 and 2 reduce with an all-reduce, which is twice the bytes.
    exchanges = {1: 2, 2: 2 * accumulation, 3: 3 * accumulation}[zero.stage]
    exchange = exchanges * cluster.exchange(weights)
    if zero.offload_parameters:
        exchange += 2 * accumulation * weights / cluster.ranks / HOST_BANDWIDTH
    if load.teacher and load.teacher.sharded and not beside:
        exchange += accumulation * cluster.gather_in_node(BF16 * load.teacher.in_layers)
    compute = accumulation * (teacher * (not beside) + student + loss)

    partition = load.parameters / cluster.ranks
    if zero.offload_optimizer:
        optimizer = partition * HOST_STEP_MOVED / HOST_BANDWIDTH
    else:
        moved = STEP_MOVED if zero.stage < 3 else PLAIN_STEP_MOVED
        optimizer = partition * moved / (cluster.gpu.bandwidth * KERNELS)
    if zero.stage < 3:
        optimizer += cluster.exchange(weights)
    time = {
        "teacher": accumulation * teacher,
        "layers": accumulation * student,
        "loss": accumulation * loss,
        "exchange not hidden": max(exchange - compute, (1 - HIDDEN) * exchange),
        "optimizer": optimizer,
        "host": _host_time(load, setup, accumulation, recorded=recorded),
    }
    if load.teacher and beside:  # students wait only if the teacher needs longer for all of them than they do
        asked = math.ceil(cluster.gpus_per_node / load.teacher.ranks)
        own = sum(time.values()) - time["teacher"]
        time["teacher"] = max(0.0, asked * time["teacher"] - own)
    return time


def probe_time(load: Load, setup: Setup, accumulation: int) -> float:
    """Seconds of an evaluation amid training, as if a token of a longer sample took no longer than one of training."""
    training = setup.training
    if not isinstance(training, CheckpointedTraining) or not training.probe_every:
        return 0.0
    forward = sum(
        layer.count * share * setup.cluster.seconds(cost.forward)
        for layer in load.layers
        for share, cost in load.costs(layer)
    )
    tokens = training.probe_samples * (training.seq_len + len(PROBED) * sum(probed_lengths(training)))
    return accumulation * forward * tokens / (training.batch * training.seq_len)


def _is_recorded(load: Load, setup: Setup, accumulation: int) -> bool:
    """Whether forward and backward are a CUDA graph (halo/training/recording.py)."""
    alike = not load.checkpoints and setup.training.sequence_parallel == 1
    whole = setup.zero.stage < 3 and not setup.zero.offload_optimizer
    alone = setup.cluster.ranks == 1 and accumulation == 1
    return alike and whole and (load.one_at_a_time or alone or BF16 * load.parameters <= SMALL)


def _host_time(load: Load, setup: Setup, accumulation: int, *, recorded: bool) -> float:
    """Seconds of a step in which the GPU waits for the host."""
    time = RECORDED_STEP if recorded else STEP
    if setup.zero.stage == 3:
        time += accumulation * load.depth * ZERO3_LAYER
    if load.teacher and load.teacher.sharded and not load.teacher.ranks:
        time += accumulation * load.depth * CUT_LAYER
    return time
