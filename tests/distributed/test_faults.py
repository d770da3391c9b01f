"""What goes wrong while training: losses that are not finite, ranks that die or hang."""

import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from halo.data.shards import write_shards
from halo.distributed import all_sum, on_rank0, rank, waits_of_at_most
from halo.errors import UserError
from halo.training.engine import read_ds_config
from tests.distributed import fault_jobs, jobs
from tests.distributed.ranks import run_ranks

ZEROS = ["zero1.json", "zero2.json", "zero3.json"]
SETTINGS = jobs.training(micro_batch=2, save_every=3)
SAMPLES = 120


def bad_shards(folder: Path, *batches: int) -> Path:
    """Shards where rank 1 of two meets a bad sample in these batches of 8, and no other rank does."""
    tokens = np.random.default_rng(0).integers(0, fault_jobs.BAD, (SAMPLES, 16)).astype(np.uint16)
    order = np.random.default_rng([SETTINGS.seed, 0]).permutation(SAMPLES)
    for batch in batches:
        tokens[order[batch * 8 + 3], 0] = fault_jobs.BAD  # of four micro-batches of 2, the second is rank 1's
    write_shards(folder, tokens, {"tokenizer": "none"})
    return folder


def skipped(folder: Path) -> list[int]:
    return [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", [*ZEROS, "zero3_offload.json"])
def test_a_step_without_a_finite_loss_changes_nothing(tmp_path, zero, bf16):
    """An infinite loss whose gradients are finite, on one rank, in the first of its two micro-batches."""
    shards = bad_shards(tmp_path / "shards", 2)
    ranks = run_ranks(2, fault_jobs.fragile, shards, tmp_path / "run", zero, SETTINGS, bf16)
    for digests in ranks:
        assert digests[2] == digests[1]
        assert len(set(digests)) == 5
    assert skipped(tmp_path / "run") == [0, 0, 1, 1, 1, 1]
    assert jobs.losses(tmp_path / "run")[2] is None


@pytest.mark.parametrize(
    ("zero", "bf16", "fused"),
    [
        ("zero1.json", False, False),
        ("zero2.json", True, False),
        ("zero3.json", True, False),
        ("zero1.json", True, True),
        ("zero2.json", False, True),
    ],
)
def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path, zero, bf16, fused):
    """A finite loss whose gradients are infinite, in the same place."""
    shards = bad_shards(tmp_path / "shards", 2)
    job = [jobs.with_fused_step, fault_jobs.fragile] if fused else [fault_jobs.fragile]
    ranks = run_ranks(2, *job, shards, tmp_path / "run", zero, SETTINGS, bf16, 0, True)
    for digests in ranks:
        assert digests[2] == digests[1]
        assert len(set(digests)) == 5
    assert skipped(tmp_path / "run") == [0, 0, 1, 1, 1, 1]
    assert None not in jobs.losses(tmp_path / "run")


@pytest.mark.parametrize("zero", ZEROS)
def test_after_too_many_skipped_steps_the_run_returns_to_a_checkpoint_and_skips_the_data(tmp_path, zero):
    """From the checkpoint of step 3 on, it is a run that never saw the bad batches 4 to 6 (nor batch 3).

    That checkpoint is not written yet when the run returns to it.
    """
    settings = replace(SETTINGS, steps=7, max_skipped=2)
    shards = bad_shards(tmp_path / "shards", 4, 5, 6)
    ranks = run_ranks(2, fault_jobs.written_late, fault_jobs.fragile, shards, tmp_path / "run", zero, settings)
    expected = run_ranks(2, fault_jobs.fragile, shards, tmp_path / "without", zero, settings, False, 4)
    for digests, without in zip(ranks, expected, strict=True):
        assert digests[4] == digests[5] == digests[6] == digests[3]
        assert digests[:3] + digests[7:] == without
    assert jobs.losses(tmp_path / "run") == jobs.losses(tmp_path / "without")
    assert skipped(tmp_path / "run") == [0, 0, 0, 3, 3, 3, 3]


def test_a_run_that_does_not_recover_ends(tmp_path):
    shards = bad_shards(tmp_path / "shards", *range(3, 15))
    with pytest.raises(UserError) as error:
        run_ranks(2, fault_jobs.fragile, shards, tmp_path / "run", "zero1.json", replace(SETTINGS, max_skipped=1))
    assert str(error.value) == (
        "run: 2 steps in a row had no finite loss and gradient, as after every return to step 3: "
        "lower the learning rate"
    )


def test_a_run_that_never_went_well_ends(tmp_path):
    shards = bad_shards(tmp_path / "shards", *range(15))
    with pytest.raises(UserError, match=r"6 steps in a row had no finite .* the last of them step 5: lower the"):
        run_ranks(2, fault_jobs.fragile, shards, tmp_path / "run", "zero1.json", replace(SETTINGS, max_skipped=5))
    with pytest.raises(UserError, match=r"6 steps in a row had no finite .* the last of them step 5: lower the"):
        run_ranks(2, fault_jobs.fragile, shards, tmp_path / "short", "zero1.json", replace(SETTINGS, max_skipped=100))


def test_a_run_does_not_end_with_a_step_that_was_skipped(tmp_path):
    """It returns to the checkpoint of step 3, as after too many in a row, and goes on with the data that follow."""
    shards = bad_shards(tmp_path / "shards", 5)
    run_ranks(2, fault_jobs.fragile, shards, tmp_path / "run", "zero1.json", SETTINGS)
    expected = run_ranks(2, fault_jobs.fragile, shards, tmp_path / "without", "zero1.json", SETTINGS, False, 3)
    assert expected
    assert skipped(tmp_path / "run") == [0, 0, 0, 1, 1, 1]
    assert jobs.losses(tmp_path / "run") == jobs.losses(tmp_path / "without")


@pytest.mark.parametrize("zero", ZEROS)
def test_weights_that_are_not_finite_complete_no_stage(tmp_path, zero):
    shards = bad_shards(tmp_path / "shards")
    settings = replace(SETTINGS, lr=3e38, warmup=0, steps=1)
    with pytest.raises(UserError, match=r"run: after step 0, weights in .* are not finite: lower the learning rate"):
        run_ranks(2, jobs.finetune, shards, tmp_path / "run", zero, settings)


@pytest.mark.parametrize("pattern", ["metrics.jsonl", "tensorboard/events*"])
def test_metrics_that_cannot_be_written_end_all_ranks(tmp_path, shards, pattern, capfd):
    run = tmp_path / "run"
    job = (jobs.distill, shards, run, "zero1.json", SETTINGS)
    told = run_ranks(2, fault_jobs.with_no_room_for, pattern, 4, *job)
    assert told == [
        f"the metrics cannot be written to {run} (File too large): "
        "mend that, and the same command resumes from the latest checkpoint"
    ] * 2  # fmt: skip
    assert "Traceback" not in capfd.readouterr().err
    assert len(run_ranks(2, *job)) == 2
    assert len(jobs.losses(run)) == 6


def test_a_rank_that_hangs_in_training_ends_the_others(tmp_path, shards):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 3000ms"):
        run_ranks(2, fault_jobs.frozen_in_time, 3, 3.0, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)
    assert time.monotonic() - began < 60


def _short_and_long_waits() -> list[str]:
    def late() -> str:
        time.sleep(2)
        return "ready"

    group = dist.new_group([0, 1])  # as DeepSpeed makes one
    with waits_of_at_most(timedelta(seconds=1)):
        all_sum(torch.ones(1))
    told = [on_rank0(late)]
    dist.all_reduce(torch.ones(1), group=group)
    dist.barrier()
    with waits_of_at_most(timedelta(seconds=1)):
        if rank() == 1:
            time.sleep(3)
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            told.append(str(error).split("] ")[-1])
    return told


def test_only_training_steps_are_impatient():
    """Rank 0 alone may work for long; within a step a late rank is an error, in every group."""
    told = run_ranks(2, _short_and_long_waits)
    assert told[0] == ["ready", "Timed out waiting 1000ms for recv operation to complete"]
    assert told[1][0] == "ready"


@pytest.mark.parametrize(
    ("zero", "message"), [({"stage": 0}, "stage 1, 2 or 3"), ({"stage": 1, "compute_grad_norm": False}, "norm tells")]
)
def test_a_deepspeed_config_under_which_no_step_is_skipped(tmp_path, zero, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=message):
        read_ds_config(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimisation": {"stage": 1}}, r"'zero_optimisation', .* \(did you mean 'zero_optimization'\?\)"),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            r"'overlap_com', .* \(did you mean 'overlap_comm'\?\)",
        ),
        ({"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True}}, "'torch_autocast'"),
    ],
)
def test_a_deepspeed_config_with_keys_that_mean_nothing(tmp_path, config, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        read_ds_config(path)
