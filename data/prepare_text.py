"""Turn text into the token shards that the stages train on.

    python data/prepare_text.py --source fineweb_edu/ --tokenizer Qwen3-1.7B/ --out shards/distill --seq_len 512

The source is a file or a folder of .txt, .jsonl (key "text") or .parquet (column "text"; FineWeb-Edu's own files).
Give each stage files of its own: two stages that take the first N samples of one source take the same text.
"""

import argparse
import sys
from pathlib import Path

from halo.errors import UserError
from halo.shards import prepare_shards
from halo.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="file or folder of text")
    parser.add_argument("--tokenizer", required=True, help="folder of the teacher's tokenizer, or its name on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens a sample")
    parser.add_argument("--samples", type=int, help="how many samples (default: each document once)")
    parser.add_argument("--needle_fraction", type=float, default=0.0, help="samples that are needle tests (default: 0)")
    parser.add_argument("--part", choices=["train", "held_out"], default="train", help="default: train")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    try:
        manifest = prepare_shards(
            arguments.source,
            load_tokenizer(arguments.tokenizer),
            arguments.out,
            seq_len=arguments.seq_len,
            seed=arguments.seed,
            part=arguments.part,
            samples=arguments.samples,
            needle_fraction=arguments.needle_fraction,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    tokens = manifest["samples"] * manifest["seq_len"]
    print(f"{arguments.out}: {manifest['samples']:,} samples, {tokens:,} tokens")


if __name__ == "__main__":
    main()
