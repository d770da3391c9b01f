"""The speed of preparing and reading token shards, compared with the tokenizer library alone on the same cores.

python -m benchmarks.data --tokenizer FOLDER [--documents 20000] [--cores 2] [--rounds 3]

Documents of FineWeb-Edu's lengths (log-normal, a thousand tokens on average) are drawn word by word from the embedded
novels and written as parquet in its schema. Library and preparation take turns. The library encodes texts that are in
memory, with its own threads and nothing in its cache; the preparation reads the files, assigns documents to parts,
tokenizes, packs, hashes and writes shards for two stages and held-out text. CPU seconds are those of the process and
its children: other work on the machine changes them less than it does wall-clock time.

Reading is `TokenStream` over the shards of 512 tokens, shuffled and verified, as a rank reads them.
"""

import argparse
import copy
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import header, table
from halo.data.packing import Part
from halo.data.preparation import prepare
from halo.data.stream import TokenStream
from halo.models.tokenizer import load_tokenizer
from halo.preset import PRESETS

PACKAGES = ("tokenizers", "transformers", "pyarrow", "mosaicml-streaming", "numpy")
PARTS = {"distill": Part(seq_len=512, tokens=1), "finetune": Part(seq_len=16_384, tokens=1)}
MICRO_BATCH = 12
PIECE = 1 << 21
"""Bytes: smaller than the default, so that a short run has many pieces, and all cores end together as in a long run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or name on the hub")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    print(header(PACKAGES, gpu=False), flush=True)
    tokenizer = load_tokenizer(args.tokenizer)
    fresh = [copy.deepcopy(tokenizer.backend_tokenizer) for _ in range(args.rounds)]  # without words in their caches

    with tempfile.TemporaryDirectory() as scratch:
        texts = draw_documents(args.documents)
        write_parquet(texts, Path(scratch, "source"))

        def library() -> int:
            return sum(len(one) for one in fresh.pop().encode_batch_fast(texts, add_special_tokens=False))

        def preparation(out: Path) -> int:
            shares = {"workers": args.cores, "piece_bytes": PIECE}
            manifests = prepare(Path(scratch, "source"), tokenizer, out, PARTS, whole=True, **shares)
            assert manifests is not None
            return sum(m["samples"] * m["seq_len"] + m["tokens_left_over"] for m in manifests.values())

        runs: dict[str, list[tuple[float, float]]] = {"library alone": [], "preparation": []}
        for turn in range(args.rounds):
            runs["library alone"].append(rates(library))
            out = Path(scratch, f"shards-{turn}")
            runs["preparation"].append(rates(lambda out=out: preparation(out)))
        print_tokenizing(runs)
        print(f"\nreading: {read(out / 'distill', 4000):,.0f} tokens/s")


def draw_documents(count: int) -> list[str]:
    novels = "".join(path.read_text() for path in sorted((PRESETS / "tiny" / "corpus").glob("*.txt")))
    words = np.array(re.findall(r"\S+\s*", novels), dtype=object)
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.2, 0.9, count).clip(30, 20_000).astype(int)
    return ["".join(words[rng.integers(0, len(words), length)]) for length in lengths]


def write_parquet(texts: list[str], folder: Path) -> None:
    """Write texts in FineWeb-Edu's schema, a thousand documents in each row group."""
    count = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i:036}>" for i in range(count)],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.org/{i}" for i in range(count)],
        "file_path": ["s3://commoncrawl/crawl-data"] * count,
        "language": ["en"] * count,
        "language_score": [0.95] * count,
        "token_count": [len(text) // 5 for text in texts],
        "score": [3.1] * count,
        "int_score": [3] * count,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "000_00000.parquet", row_group_size=1000)


def rates(run: Callable[[], int]) -> tuple[float, float]:
    """Tokens a second of wall-clock, and of CPU time."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = run()
    return tokens / (time.perf_counter() - wall), tokens / (cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """The CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def print_tokenizing(runs: dict[str, list[tuple[float, float]]]) -> None:
    rows = []
    for name, measured in runs.items():
        wall, cpu = (median(values) for values in zip(*measured, strict=True))
        best = max(value for value, _ in measured)
        rows.append([name, f"{wall:,.0f}", f"{best:,.0f}", f"{cpu:,.0f}"])
    print(table(["", "tokens/s, median", "best", "tokens a CPU second"], rows))
    alone, prepared = runs.values()
    wall, cpu = (median(p[i] / a[i] for p, a in zip(prepared, alone, strict=True)) for i in (0, 1))
    print(f"\npreparation over library, median of the turns: {wall:.0%} by the clock, {cpu:.0%} by CPU time")


def read(folder: Path, batches: int) -> float:
    stream = TokenStream(folder, micro_batch=MICRO_BATCH, seed=0, rank=0, world_size=1)
    began = time.perf_counter()
    tokens = sum(next(stream).numel() for _ in range(batches))
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
