"""What the training stages will take on a cluster: memory of a GPU, time, disk. Needs no GPU and downloads nothing.

python launcher/plan.py --preset hypenet-9b --gpu h200 --nodes 2 --ds_config ds_configs/zero3.json

Ends with status 0 if all fits, 1 if something does not, and 2 with one line if something is wrong.
"""

import argparse
import os
import sys
from dataclasses import replace

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, when it is imported, would say that it finds no GPU

from halo.config import load_config
from halo.errors import UserError
from halo.plan.advice import advice
from halo.plan.cluster import Cluster, Setup, Zero
from halo.plan.load import build_models
from halo.plan.stage import plan_stage, stages_of
from halo.plan.text import assumptions, heading, table, verdict
from halo.tables import suggest
from halo.training.engine import read_ds_config
from halo.training.gpus import GPUS, find_gpu


def main() -> int:
    """Print the plans; returns the exit status."""
    arguments, overrides = _parser().parse_known_args()
    config = load_config(arguments.preset, overrides)
    known = stages_of(config)
    if arguments.stage is not None and arguments.stage not in known:
        near = suggest(arguments.stage, known)
        raise UserError(f"plan knows the stages that train, {', '.join(known)}, not '{arguments.stage}'{near}")
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    gpu = find_gpu(arguments.gpu)
    if arguments.network is not None:
        gpu = replace(gpu, network=arguments.network * 1e9 / 8)
    cluster = Cluster(gpu=gpu, nodes=arguments.nodes, gpus_per_node=arguments.gpus_per_node)
    zero = Zero.read(read_ds_config(arguments.ds_config), cluster.ranks)
    models = build_models(config)

    parts, all_fit = [heading(models, cluster, zero, arguments.ds_config)], True
    for stage in [arguments.stage] if arguments.stage else known:
        try:
            plan = plan_stage(models, stage, Setup(training=getattr(config, stage), cluster=cluster, zero=zero))
        except UserError as error:
            if arguments.stage:
                raise
            parts.append(f"{stage} cannot run: {error}\n")
            all_fit = False
            continue
        parts += [table(plan), f"{verdict(plan, advice(models, plan))}\n"]
        all_fit &= plan.fits
    print("\n".join([*parts, assumptions(cluster)]), end="")
    return 0 if all_fit else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any setting of the preset can be overridden: --distill.micro_batch 6",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="tiny", help="a shipped preset or the path of a TOML file (default: tiny)")
    parser.add_argument("--stage", help="plan this stage alone (default: every stage that trains)")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--nodes", type=int, default=1, help="default: 1")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="default: 8")
    parser.add_argument(
        "--network", type=float, help="Gbit/s a GPU has to other nodes (default: as such GPUs are sold)"
    )
    parser.add_argument("--ds_config", default="ds_configs/zero1.json", help="DeepSpeed JSON (default: %(default)s)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
