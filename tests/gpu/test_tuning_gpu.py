"""Processes of one machine tune a kernel of fla once; a later one does not tune at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halo.training import tuning
from hypenet import HypeNetConfig, HypeNetForCausalLM
from tests.hypenet.sizes import SIZES

pytest.importorskip("fla")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1200),
]


def train() -> None:
    """Forward and backward of a DeltaNet on fla's kernels. Prints how many were tuned."""
    tuning.tune_once()
    keys = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    keys |= {"num_hidden_layers": 1, "mixer_types": ["deltanet"]}
    model = HypeNetForCausalLM(HypeNetConfig(**{**SIZES, **keys})).cuda().bfloat16().train()
    tokens = torch.randint(1, 61, (2, 300), device="cuda")
    model(tokens, labels=tokens).loss.backward()
    count = len(tuning._seconds)
    tuning.report_tuning()
    print("tuned", count)


def tuned(folder: Path, processes: int) -> list[int]:
    """How many kernels each of some processes tuned, which begin together with the results in `folder`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "FLA_"))}
    code = "from tests.gpu.test_tuning_gpu import train; train()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=variables | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    counts = []
    for process in started:
        said, _ = process.communicate(timeout=1000)
        assert process.returncode == 0
        counts.append(int(said.split()[-1]))
        assert ("fla's kernels were tuned" in said) == (counts[-1] > 0)
    return counts


def test_each_kernel_is_tuned_once_on_a_machine(tmp_path):
    first = tuned(tmp_path, 2)
    kept = list(tmp_path.glob("hypenet-*/triton/*/*.autotune.json"))
    assert sum(first) == len(kept) > 0
    assert tuned(tmp_path, 1) == [0]
