"""What the training stages need on a cluster: GPU memory, time, disk. Needs no GPU and downloads nothing.

python launcher/plan.py --preset hypenet-9b --gpu h200 --nodes 2 --ds_config ds_configs/zero3.json

Exits with 0 if everything fits, with 1 if something does not, and with 2 and one line after a mistake.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from halo import bounds
from halo.cli import GENERAL, new_parser, read
from halo.config import Config
from halo.errors import UserError, exit_on_user_error
from halo.options import OneLineParser, within
from halo.preset import DEFAULT_PRESET, load_config
from halo.tables import suggest
from halo.training.gpus import GPUS, find_gpu


def plan(arguments: Namespace, config: Config) -> int:
    """Print the plans; returns the exit status."""
    # Not before the command line is read: they import torch. DeepSpeed would warn that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from halo.plan.advice import advice
    from halo.plan.cluster import Cluster, Setup, Zero
    from halo.plan.load import build_models
    from halo.plan.stage import plan_stage, stages_of
    from halo.plan.text import assumptions, heading, table, verdict
    from halo.training.engine import read_ds_config

    known = stages_of(config)
    _check_stage(arguments.stage, known)
    gpu = find_gpu(arguments.gpu)
    if arguments.network is not None:
        gpu = replace(gpu, network=arguments.network * 1e9 / 8)
    cluster = Cluster(gpu=gpu, nodes=arguments.nodes, gpus_per_node=arguments.gpus_per_node)
    zero = Zero.read(read_ds_config(arguments.ds_config), cluster.ranks)
    models = build_models(config)

    parts, all_fit = [heading(models, cluster, zero, arguments.ds_config)], True
    for stage in [arguments.stage] if arguments.stage else known:
        try:
            found = plan_stage(models, stage, Setup(training=getattr(config, stage), cluster=cluster, zero=zero))
        except UserError as error:
            if arguments.stage:
                raise
            parts.append(f"{stage} cannot run: {error}\n")
            all_fit = False
            continue
        parts += [table(found), f"{verdict(found, advice(models, found))}\n"]
        all_fit &= found.fits
    print("\n".join([*parts, assumptions(cluster)]), end="")
    return 0 if all_fit else 1


def _check_stage(stage: str | None, stages: Sequence[str]) -> None:
    if stage is not None and stage not in stages:
        near = suggest(stage, stages)
        raise UserError(f"plan knows the stages that train, {', '.join(stages)}, not '{stage}'{near}")


def _plan_parser() -> OneLineParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help="a shipped preset or the path of a TOML file (default: %(default)s)"
    )
    parser.add_argument("--stage", help="plan this stage alone (default: every stage that trains)")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)} (required)")
    parser.add_argument(
        "--nodes", type=within(bounds.Ranks), default=1, help="the number of nodes (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus_per_node", type=within(bounds.Ranks), default=8, help="the GPUs of a node (default: %(default)s)"
    )
    parser.add_argument(
        "--network",
        type=within(bounds.Giga),
        help="Gbit/s of each GPU to other nodes (default: that of such machines as sold)",
    )
    parser.add_argument("--ds_config", default="ds_configs/zero1.json", help="DeepSpeed JSON (default: %(default)s)")
    return parser


if __name__ == "__main__":
    with exit_on_user_error():
        given, overrides = read(_plan_parser(), shown=(*GENERAL, "pretrain", "align", "distill", "finetune"))
        sys.exit(plan(given, load_config(given.preset, overrides)))
