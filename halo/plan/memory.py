"""What is in a GPU's memory at the moments of a step at which it can be fullest."""

import math

from halo.plan.assumptions import BF16, OPTIMIZER_STATE, STEP_BUFFERS
from halo.plan.cluster import Cluster, Setup, Zero
from halo.plan.load import Load
from halo.training.gathering import live_parameters

PARTS = (
    *("parameters", "optimizer", "gradients", "made in forward", "step's buffers", "teacher"),
    *("activations", "one layer", "loss", "gathered", "buckets"),
)
"""The parts of a GPU's memory, in the order in which they are shown."""


def memory_by_moment(load: Load, setup: Setup, accumulation: int) -> dict[str, dict[str, float]]:
    """Bytes on a GPU by part, for each moment at which memory can be fullest."""
    n, zero, cluster = load.parameters, setup.zero, setup.cluster
    partition, sharded, accumulates = n / cluster.ranks, zero.stage == 3, accumulation > 1
    state = {
        "parameters": BF16 * (partition if sharded else n) * (not zero.offload_parameters),
        "optimizer": OPTIMIZER_STATE * partition * (not zero.offload_optimizer),
        "teacher": _teacher_bytes(load, cluster),
    }
    # ZeRO-1 and 2 keep reduced gradients of this rank's partition; ZeRO-1 adds up whole gradients before.
    reduced = {1: n if accumulates else partition, 2: partition * (1 + accumulates), 3: partition}[zero.stage]
    gradients = BF16 * reduced * (not zero.offload_optimizer)
    before_backward = gradients * (accumulates or sharded)
    # A head's gradient stays whole until backward ends if it is tied, or (without accumulation) larger than a bucket.
    head = BF16 * load.head
    alone = zero.stage < 2 and not accumulates and load.head > zero.reduce_bucket
    of_head = head * (load.tied or alone)
    buckets = zero.contiguous * BF16 * zero.reduce_bucket * (1 + ((zero.overlap and cluster.ranks > 1) or sharded))
    static = buckets / 2 * sharded  # ZeRO-3's are always there, except the copy that is reduced
    # Parameter groups, which are layers, are stepped one after the other.
    group = load.group or max(load.head, *(layer.parameters for layer in load.layers))
    stepped = min(group / cluster.ranks, zero.sub_group) if sharded else group / cluster.ranks

    external, gathered = _gathered(load, setup)
    activations, one_layer, freed = _layer_bytes(load, zero)
    loss = load.loss_held + max(load.loss_chunk, head * (gathered > 0 and not load.tied))
    layer = {"one layer": one_layer, "made in forward": load.made, "gathered": gathered}
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
        moments["the loss"] = {"loss": loss, "activations": activations, "gathered": gathered} | {
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
    return BF16 * (load.teacher.parameters - cut + cut / cluster.gpus_per_node) - load.teacher.saved


def _gathered(load: Load, setup: Setup) -> tuple[float, float]:
    """Bytes of whole weights under ZeRO-3: those that stay until the step; the most in a layer, and in the loss."""
    zero = setup.zero
    if zero.stage < 3 or setup.cluster.ranks == 1:
        return 0.0, 0.0
    if load.made:
        return BF16 * load.external, BF16 * load.external
    largest = max(layer.parameters for layer in load.layers)
    # DeepSpeed keeps the last layers from forward to backward, until it has counted as many elements.
    kept = 1 if zero.max_reuse is None else math.ceil(zero.max_reuse / largest)
    kept = min(kept, sum(layer.count for layer in load.layers))
    live = live_parameters(largest, load.external) if zero.max_live is None else zero.max_live
    ahead = 0 if zero.prefetch == 0 else min(live, load.parameters)
    return BF16 * load.external, BF16 * max(load.external + max(1, kept) * largest, ahead)


def _layer_bytes(load: Load, zero: Zero) -> tuple[float, float, float]:
    """Bytes that layers keep for backward; that a layer's backward adds; that are freed when a bucket is full."""
    if load.one_at_a_time:
        return load.held, max(layer.cost.peak for layer in load.layers), 0.0
    costs = [(layer.count, cost) for layer in load.layers for cost in load.costs(layer)]
    kept = float(sum(layer.count * layer.input_bytes for layer in load.layers))
    kept += sum(count * share * cost.kept for count, (share, cost) in costs)
    layers = zero.reduce_bucket // max(layer.parameters for layer in load.layers)
    freed = min(kept, layers * max(load.costs(layer)[-1][1].kept for layer in load.layers))
    return load.held + kept, max(cost.peak - cost.kept for _, (_, cost) in costs), freed
