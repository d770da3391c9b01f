"""Turn FineWeb-Edu, or any text, into the token shards of every stage, in one pass.

    python data/prepare_fineweb_edu.py --preset hypenet-9b --out shards                      # the 10B-token sample
    python data/prepare_fineweb_edu.py --preset hypenet-9b --out shards --source texts/ --whole

The preset names the teacher, whose tokenizer is used, and for each stage the length of its samples and the number of
tokens it trains on. The source is a data set on the hub with the layout of FineWeb-Edu, or a file or folder of .parquet
(column "text"), .jsonl (key "text") or .txt. After any interruption, the same command resumes. More: docs/data.md.
"""

import os
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from halo import bounds
from halo.cli import new_parser, read
from halo.data.sources import FINEWEB_EDU, SAMPLE, fetch_source
from halo.errors import exit_on_user_error
from halo.graph import conversion
from halo.options import OneLineParser, within
from halo.preset import load_config, remembered


def prepare_stages(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prepare the shards of every stage, or this task's part of them, and say how launchers are given them."""
    recorded = Path(arguments.run, "config.toml") if arguments.run else None
    config = load_config(arguments.preset, overrides, recorded=recorded)
    if recorded and (differing := remembered(arguments.preset, overrides, recorded)):
        print(differing)
    # Not before the command line is read: they import torch and transformers.
    from halo.data.packing import Part
    from halo.data.preparation import HELD_OUT_SHARE, prepare
    from halo.models.tokenizer import load_tokenizer

    stages = {name: getattr(config, name) for name in trained_on_shards()}
    source, name = fetch_source(arguments.source, arguments.sample)
    manifests = prepare(
        source,
        load_tokenizer(config.teacher),
        arguments.out,
        {name: Part(seq_len=s.seq_len, tokens=s.steps * s.batch * s.seq_len) for name, s in stages.items()},
        seed=arguments.seed,
        source_name=name,
        whole=arguments.whole,
        held_out=HELD_OUT_SHARE if arguments.held_out is None else arguments.held_out,
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
    if skipped := max(manifest.get("skipped", 0) for manifest in manifests.values()):
        print(f"{skipped:,} documents of the source have no text, and were skipped")
    print(f"--heldout {arguments.out / 'held_out'}: text that no stage trains on")


def trained_on_shards() -> list[str]:
    """The stages of a conversion that train."""
    return [stage.name for stage in conversion() if stage.trains]


def _preparation_parser() -> OneLineParser:
    parser = new_parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--preset", required=True, help="a shipped preset or the path of a TOML file (required)")
    parser.add_argument("--run", help="a run's folder, whose recorded settings stand in for the preset's")
    parser.add_argument("--out", type=Path, required=True, help="the folder to create, or to resume in (required)")
    parser.add_argument(
        "--source", default=FINEWEB_EDU, help="a data set on the hub, a file or a folder (default: %(default)s)"
    )
    parser.add_argument("--sample", help=f"the sample or dump of a data set on the hub (default: {SAMPLE})")
    parser.add_argument("--whole", action="store_true", help="use all of the source, in the stages' proportions")
    parser.add_argument(
        "--held_out", type=within(bounds.Share), help="share of documents that no stage trains on (default: 0.005)"
    )
    parser.add_argument("--zstd", action="store_true", help="compress the shards")
    parser.add_argument("--seed", type=within(bounds.Seed), default=0, help="the seed of order and shares (default: 0)")
    parser.add_argument(
        "--workers", type=within(bounds.Ranks), default=cores, help=f"processes (default: one per core, {cores} here)"
    )
    parser.add_argument(
        "--task", type=within(bounds.RanksOrNone), default=0, help="the number of this task, from 0 (default: 0)"
    )
    parser.add_argument(
        "--tasks", type=within(bounds.Ranks), default=1, help="the number of tasks that share the work (default: 1)"
    )
    # Options of the launchers: slurm/table2.sh passes all of them.
    parser.add_argument("--ds_config", help=SUPPRESS)
    parser.add_argument("--from", dest="taken", nargs="+", help=SUPPRESS)
    return parser


if __name__ == "__main__":
    with exit_on_user_error():
        given, rest = read(_preparation_parser(), shown=("", *trained_on_shards()))
        prepare_stages(given, rest)
