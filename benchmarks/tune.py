"""Tune fla's kernels on this GPU, and write what was found where halo/training/tuning.py looks for it.

    python -m benchmarks.tune [--mixers gdn kda ...] [--folder halo/training/tuned/<GPU>]

A GPU of the same name then needs no tuning for these mixers and heads. What a file has for another shape stays.
"""

import argparse
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import header
from halo.training.tuning import MEASURED, gpu_folder
from hypenet import HypeNetConfig, HypeNetForCausalLM

MIXERS = ("deltanet", "gdn", "gla", "gsa", "hgrn2", "kda", "mamba2", "rwkv7")
"""Those that run on fla's kernels."""
HEADS = ((9, 64), (16, 128), (32, 128))
"""(heads, head size) of SmolLM2-135M, of Qwen3-1.7B, and of Qwen3-4B and 8B."""
TOKENS = ((12, 512, False), (1, 16_384, False), (1, 16_384, True))
"""(sequences, length, packed documents) of stages 1 and 2, and of stage 3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--folder", type=Path, help="(default: this GPU's in halo/training/tuned)")
    args = parser.parse_args()
    print(header())
    found: dict[str, dict[tuple[Any, ...], Any]] = {}

    def listen(*, fn: Any, key: tuple[Any, ...], best_config: Any, **_: Any) -> None:
        found.setdefault(fn.__name__, {})[key] = best_config

    os.environ["FLA_CACHE_MODE"] = "disabled"  # what was measured before does not count
    importlib.import_module("triton").knobs.autotuning.listener = listen
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        for mixer, (heads, dim), tokens in product(args.mixers, HEADS, TOKENS):
            train(mixer, heads, dim, *tokens)
            print(
                f"{mixer}, {heads} heads of {dim}, {tokens[0]} x {tokens[1]}: {len(found)} kernels so far", flush=True
            )
    folder = args.folder or MEASURED / gpu_folder(torch.cuda.get_device_name())
    write(found, folder)
    print(f"{sum(map(len, found.values()))} configurations of {len(found)} kernels in {folder}")


def train(mixer: str, heads: int, dim: int, batch: int, length: int, packed: bool) -> None:
    """Forward and backward of one layer in bf16; of two documents in a row if they are packed."""
    keys = {"vocab_size": 64, "hidden_size": heads * dim, "intermediate_size": 64, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": dim}
    model = HypeNetForCausalLM(HypeNetConfig(**keys, mixer_types=[mixer])).cuda().bfloat16().train()
    tokens = torch.randint(1, 64, (batch, length), device="cuda")
    positions = torch.arange(length, device="cuda")[None] % (length // 2) if packed else None
    model(tokens, labels=tokens, position_ids=positions).loss.backward()
    torch.cuda.synchronize()


def write(found: Mapping[str, Mapping[tuple[Any, ...], Any]], folder: Path) -> None:
    """Write configurations as fla reads them, beside those that are there.

    Args:
        found: the kernel's name -> Triton's key of a shape -> the best `triton.Config`.
    """
    keys = importlib.import_module("fla.ops.utils.cache").AutotuneKey
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, configs in found.items():
        path = folder / f"{kernel}.json"
        entries = json.loads(path.read_text())["autotune_entries"] if path.exists() else {}
        for key, config in configs.items():
            settings = {name: value for name, value in vars(config).items() if name != "pre_hook"}
            entries[keys.key_hash(key)] = {"autotune_key": keys.normalize_autotune_key(key), "config": settings}
        about = {"kernel_name": kernel, "triton_version": importlib.import_module("triton").__version__}
        path.write_text(json.dumps(about | {"autotune_entries": entries}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
