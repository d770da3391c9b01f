"""Turn FineWeb-Edu, or any text, into the token shards of every stage, in one pass.

    python data/prepare_fineweb_edu.py --preset hypenet-9b --out shards                      # the 10B-token sample
    python data/prepare_fineweb_edu.py --preset hypenet-9b --out shards --source texts/ --whole

The preset says the tokenizer (the teacher's), and for each stage the length of its samples and how many tokens it
trains on. The source is a data set on the hub that is laid out as FineWeb-Edu is, or a file or folder of .parquet
(column "text"), .jsonl (key "text") or .txt. Typed again after an end of any kind, the command goes on. More stands in
docs/data.md.
"""

import argparse
import os
import sys
from pathlib import Path

from halo.config import load_config
from halo.data.packing import Part
from halo.data.preparation import HELD_OUT_SHARE, prepare
from halo.data.sources import FINEWEB_EDU, SAMPLE, fetch_source
from halo.errors import UserError
from halo.graph import conversion
from halo.models.tokenizer import load_tokenizer


def main() -> None:
    arguments, overrides = parse()
    recorded = Path(arguments.run, "config.toml") if arguments.run else None
    config = load_config(arguments.preset, overrides, recorded=recorded)
    stages = {stage.name: getattr(config, stage.name) for stage in conversion() if stage.trains}
    source, name = fetch_source(arguments.source, arguments.sample)
    manifests = prepare(
        source,
        load_tokenizer(config.teacher),
        arguments.out,
        {name: Part(seq_len=s.seq_len, tokens=s.steps * s.batch * s.seq_len) for name, s in stages.items()},
        seed=arguments.seed,
        source_name=name,
        whole=arguments.whole,
        held_out=arguments.held_out,
        compression="zstd" if arguments.zstd else "",
        workers=arguments.workers,
        task=arguments.task,
        tasks=arguments.tasks,
    )
    if manifests is None:
        print(f"{arguments.out}: task {arguments.task} has finished; the last of {arguments.tasks} tasks does the rest")
        return
    for stage, manifest in manifests.items():
        tokens = manifest["samples"] * manifest["seq_len"]
        print(f"--{stage}.shards {arguments.out / stage}: {manifest['samples']:,} samples, {tokens:,} tokens")
    print(f"--heldout {arguments.out / 'held_out'}: text that no stage trains on")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any setting of the preset can be overridden: --align.steps 40000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--preset", required=True, help="a shipped preset or the path of a TOML file")
    parser.add_argument("--run", help="a run's folder, whose recorded settings stand in for the preset's")
    parser.add_argument("--out", type=Path, required=True, help="folder to create, or to go on in")
    parser.add_argument(
        "--source", default=FINEWEB_EDU, help="name on the hub, or file or folder (default: %(default)s)"
    )
    parser.add_argument("--sample", help=f"which sample or dump, for a name on the hub (default: {SAMPLE})")
    parser.add_argument("--whole", action="store_true", help="share out all of the source, in the stages' proportions")
    parser.add_argument(
        "--held_out", type=float, default=HELD_OUT_SHARE, help="share of documents (default: %(default)s)"
    )
    parser.add_argument("--zstd", action="store_true", help="compress the shards")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: one a core, {cores} here)")
    parser.add_argument("--task", type=int, default=0, help="which share of the work to do here, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="how many share the work, each with its own --task")
    # Options of the launchers: slurm/table2.sh passes all of them.
    parser.add_argument("--ds_config", help=argparse.SUPPRESS)
    parser.add_argument("--from", nargs="+", dest="taken", help=argparse.SUPPRESS)
    return parser.parse_known_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
