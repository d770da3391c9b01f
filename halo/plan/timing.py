"""What a step's time goes into.

An operation takes the longer of computing and moving; the ranks' exchange its bytes over the links, as far as
computation does not hide it.
"""

import math

from halo.plan.assumptions import BF16, HIDDEN, HOST_BANDWIDTH, HOST_STEP_MOVED, KERNELS, STEP, STEP_MOVED
from halo.plan.cluster import Setup
from halo.plan.load import Load


def step_time(load: Load, setup: Setup, accumulation: int) -> dict[str, float]:
    """Seconds of a step, by part."""
    cluster, zero = setup.cluster, setup.zero
    weights = BF16 * load.parameters
    teacher = cluster.seconds(load.teacher.work) if load.teacher else 0.0
    beside = load.teacher is not None and load.teacher.ranks > 0
    student = 0.0
    for layer in load.layers:
        for share, cost in load.costs(layer):
            student += layer.count * share * (cluster.seconds(cost.forward) + cluster.seconds(cost.backward))
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
        optimizer = partition * STEP_MOVED / (cluster.gpu.bandwidth * KERNELS)
    if zero.stage < 3:
        optimizer += cluster.exchange(weights)
    time = {
        "teacher": accumulation * teacher,
        "layers": accumulation * student,
        "loss": accumulation * loss,
        "exchange not hidden": max(exchange - compute, (1 - HIDDEN) * exchange),
        "optimizer": optimizer,
        "host": STEP,
    }
    if load.teacher and beside:  # students wait only if the teacher needs longer for all of them than they do
        asked = math.ceil(cluster.gpus_per_node / load.teacher.ranks)
        own = sum(time.values()) - time["teacher"]
        time["teacher"] = max(0.0, asked * time["teacher"] - own)
    return time
