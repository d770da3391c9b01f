"""ZeRO-3 gathers a layer while the one before it computes, and holds little more."""

import pytest
import torch

from halo.training.gathering import LIVE, PREFETCH, REUSE, fill_gathering
from tests.distributed import gathering_jobs
from tests.distributed.ranks import run_ranks

BEFORE = {PREFETCH: 0, LIVE: 1_000_000_000, REUSE: 0}
"""Nothing ahead."""


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_layer_is_on_its_way_before_it_is_needed(tmp_path, shards, checkpointing):
    before = run_ranks(2, gathering_jobs.gathered, shards, tmp_path, checkpointing, BEFORE)
    now = run_ranks(2, gathering_jobs.gathered, shards, tmp_path, checkpointing, {})
    for waited, seen in zip(before, now, strict=True):
        assert seen["losses"] == waited["losses"]
        recorded, *exposed = seen["exposed"]
        assert recorded[:4] == seen["layers"]  # DeepSpeed learns the order first
        assert waited["exposed"][1][:4] == seen["partitioned"]
        assert exposed == [[0] * len(recorded)] * 3
        # A smaller layer may bring one parameter of the layer after it; norms are always whole.
        one, norms = seen["largest"], sum(seen["layers"]) - sum(seen["partitioned"])
        assert max(seen["live"]) <= seen["head"] + 2 * max(seen["layers"]) + one + norms
        assert max(waited["live"]) <= seen["head"] + max(seen["layers"]) + norms


def test_stage_1_gathers_a_mixer_once_and_ahead(tmp_path, shards):
    for seen in run_ranks(2, gathering_jobs.regressions_gathered, shards, tmp_path):
        recorded, *exposed = seen["exposed"]
        assert all(recorded[: seen["layers"]])
        for entries in exposed:
            assert entries == [entries[0]] + [0] * (2 * seen["layers"] - 1)


@pytest.mark.parametrize(
    "changes", [{}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}], ids=["full", "window"]
)
def test_a_cut_teacher_gathers_the_next_layer_while_one_computes(tmp_path, changes):
    for found in run_ranks(2, gathering_jobs.teacher_gathered, tmp_path, changes):
        for whole, cut in found["pairs"]:
            assert torch.equal(whole, cut)
        assert found["seen"] == 2 * [*3 * [(True, 1)], (False, 1)]
        assert found["contexts"] == 1


def test_numbers_in_the_json_stay():
    layers = [[10, 2_000_000, 3_000_000, 20], [10, 2_000_000, 2_500_000, 4_000_000]]
    auto = {PREFETCH: "auto", LIVE: "auto", REUSE: "auto", "stage": 3}
    filled = {PREFETCH: 4_500_001, LIVE: 7 + 17_000_020, REUSE: 1, "stage": 3}
    assert fill_gathering(auto, layers, 7) == filled
    for key in (PREFETCH, LIVE, REUSE):
        assert fill_gathering(auto | {key: 5}, layers, 7) == filled | {key: 5}
    assert fill_gathering({"stage": 3}, layers, 7) == {"stage": 3}
    wide = {"stage3_param_persistence_threshold": 2_500_000}
    assert fill_gathering(auto | wide, layers, 7)[PREFETCH] == 1
