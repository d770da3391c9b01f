"""ZeRO-3 and a cut teacher gather ahead over NCCL as they do over gloo (tests/distributed/test_gathering.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from halo.data.shards import write_shards
from tests.distributed import gathering_jobs
from tests.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 64, (60, 16)).astype(np.uint16)
    write_shards(tmp_path / "shards", tokens, {"tokenizer": "none"})
    return tmp_path / "shards"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_no_layer_waits_for_its_weights(tmp_path, shards, checkpointing):
    for seen in run_ranks(2, gathering_jobs.gathered, shards, tmp_path, checkpointing, {}, timeout=300):
        recorded, *exposed = seen["exposed"]
        assert exposed == [[0] * len(recorded)] * 3
        assert np.isfinite(seen["losses"]).all()


def test_a_cut_teacher_is_the_whole_one(tmp_path):
    for found in run_ranks(2, gathering_jobs.teacher_gathered, tmp_path, {}, timeout=300):
        for whole, cut in found["pairs"]:
            torch.testing.assert_close(cut, whole)
        assert found["seen"] == 2 * [*3 * [(True, 1)], (False, 1)]
