"""A plan, to be read in a terminal."""

import textwrap
from itertools import zip_longest

from halo.plan import assumptions as assumed
from halo.plan.assumptions import GIB
from halo.plan.cluster import Cluster, Zero
from halo.plan.load import Models
from halo.plan.stage import StagePlan

WIDTH = 46
"""The width of the left column, memory; the right one is time."""


def heading(models: Models, cluster: Cluster, zero: Zero, ds_config: str) -> str:
    """The models and the cluster of the plan."""
    kinds = models.hybrid.config.mixer_types
    rnn = next((kind for kind in kinds if kind != "attn"), "no RNN")
    sizes = [sum(p.numel() for p in model.parameters()) / 1e9 for model in (models.teacher, models.hybrid)]
    offload = " and an optimizer on the host" if zero.offload_optimizer else ""
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    return (
        f"From {models.source}: a teacher of {sizes[0]:.2f}B parameters, a hybrid of {sizes[1]:.2f}B "
        f"({kinds.count('attn')} of {len(kinds)} layers attention, the others {rnn})\n"
        f"On {nodes} of {cluster.gpus_per_node} {cluster.gpu.device} ({cluster.gpu.memory} GiB), "
        f"with {ds_config}: ZeRO-{zero.stage}{offload}\n"
    )


def table(plan: StagePlan) -> str:
    """One stage: memory on the left, time on the right."""
    training, cluster = plan.setup.training, plan.setup.cluster
    tokens = training.batch * training.seq_len
    times = "once" if plan.accumulation == 1 else f"{plan.accumulation} times"
    how = [f"a GPU computes {plan.micro_batch} sequence{'s' * (plan.micro_batch > 1)} {times} a step"]
    if plan.load.checkpoints:
        computed_again = max(0, plan.load.depth - plan.load.kept)
        how.append(f"activation checkpointing of {computed_again} of {plan.load.depth} layers")
    if plan.load.teacher is not None:
        teacher = plan.load.teacher
        where = f"on {teacher.ranks} GPUs of each node, which are not shown" if teacher.ranks else "on every GPU"
        how.append(f"teacher {'sharded' if teacher.sharded else 'whole'}{', in FP8,' * (teacher.saved > 0)} {where}")

    left = [("memory of a GPU, GiB", ""), (f"at its fullest, {plan.moment}:", "")]
    left += [(f"  {name}", f"{size / GIB:.2f}") for name, size in plan.memory.items() if size]
    left += [
        ("allocated", f"{plan.allocated / GIB:.2f}"),
        ("context, NCCL, fragmentation", f"{plan.allowance / GIB:.2f}"),
        ("needed", f"{plan.needed / GIB:.2f}"),
    ]
    if plan.host:
        left.append(("and of a node's own memory", f"{plan.host / GIB:.1f}"))
    hours = plan.gpu_hours / cluster.ranks
    right = [("time of a step, s", ""), ("", "")]
    right += [(f"  {name}", f"{seconds:.3f}") for name, seconds in plan.time.items() if seconds]
    right += [
        ("step", f"{plan.seconds:.3f}"),
        ("tokens/s", f"{plan.tokens_per_second:,.0f}"),
        ("tokens/s a GPU", f"{plan.tokens_per_second / cluster.ranks:,.0f}"),
        ("MFU", f"{plan.mfu:.1%}"),
        *([("an evaluation (probe_every), s", f"{plan.probe:.1f}")] if plan.probe else []),
        ("hours of the stage", f"{hours:,.1f}"),
        ("GPU hours of the stage", f"{plan.gpu_hours:,.0f}"),
        ("a checkpoint, GB", f"{plan.checkpoint / 1e9:,.1f}"),
    ]
    lines = [
        f"{plan.stage}: {training.steps:,} steps of {training.batch} x {training.seq_len:,} tokens, "
        f"{training.steps * tokens / 1e9:.3g}B in all; {plan.load.parameters / 1e9:.3g}B parameters are trained",
        f"  {'; '.join(how)}",
        "",
        *(f"  {_cell(a)}  {_cell(b)}".rstrip() for a, b in zip_longest(left, right, fillvalue=("", ""))),
    ]
    return "\n".join(lines) + "\n"


def verdict(plan: StagePlan, change: str) -> str:
    """One line: whether it fits, and what to change."""
    memory = plan.setup.cluster.gpu.memory
    if plan.fits:
        room = f"{plan.stage} fits: {plan.needed / GIB:.1f} of {memory} GiB"
    else:
        room = f"{plan.stage} does not fit: {plan.needed / GIB:.1f} GiB where there are {memory}"
    return f"{room}; {change}" if change else room


def assumptions(cluster: Cluster) -> str:
    """The assumptions behind the figures."""
    gpu = cluster.gpu
    products = (gpu.reached or gpu.peak * assumed.REACHED) * assumed.PRODUCTS
    rates = [
        f"matrix products {products / 1e12:.0f} TFLOP/s (the data sheet's peak: {gpu.peak / 1e12:.0f})",
        f"attention {gpu.peak * assumed.FLASH_ATTENTION / 1e12:.0f} TFLOP/s",
        f"memory {gpu.bandwidth * assumed.KERNELS / 1e12:.2f} TB/s in kernels, "
        f"{gpu.bandwidth * assumed.BANDWIDTH / 1e12:.2f} in other operations",
        f"from the node's other GPUs {gpu.link * assumed.LINK / 1e9:.0f} GB/s",
        f"from other nodes {gpu.network * assumed.NETWORK / 1e9:.0f} GB/s a GPU",
        f"{assumed.HIDDEN:.0%} of the exchange within a step hidden",
    ]
    lines = [
        f"Assumed: {'; '.join(rates)}.",
        f"Beside what is allocated: {assumed.CONTEXT / GIB:.0f} GiB for CUDA, {assumed.NCCL / GIB:.0f} GiB for NCCL "
        f"if there is more than one GPU, {assumed.FRAGMENTATION:.0%} for fragmentation.",
        "Weights and gradients in bf16, weights and moments of the optimizer in fp32, laid out as DeepSpeed does; "
        "activations from a dry run of each kind of layer.",
        "Left out: the exchange of ranks that share a sequence (docs/long-context.md), reading data, saving "
        "checkpoints, compiling kernels, and the stages that do not train.",
    ]
    return "\n".join(textwrap.fill(line, 110) for line in lines) + "\n"


def _cell(pair: tuple[str, str]) -> str:
    name, value = pair
    return f"{name:<{WIDTH - 12}}{value:>10}" if value else f"{name:<{WIDTH - 2}}"
