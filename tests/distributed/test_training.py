"""Every stage under ZeRO on gloo ranks gives what one process gives."""

from pathlib import Path

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run_ranks


def run(tmp_path: Path, name: str, ranks: int, job, shards: Path, zero: str, settings, *args):
    folder = tmp_path / name
    weights = run_ranks(ranks, job, shards, folder, zero, settings, *args)[0].weights
    return jobs.losses(folder), weights


def assert_same(one, two, steps=6):
    (losses_one, weights_one), (losses_two, weights_two) = one, two
    assert len(losses_one) == steps
    assert losses_two == pytest.approx(losses_one, rel=1e-5)
    assert weights_one.keys() == weights_two.keys()
    for name, weight in weights_one.items():
        # A twentieth of a step's size: where a gradient is next to zero, AdamW makes much of its rounding.
        torch.testing.assert_close(weights_two[name], weight, rtol=1e-4, atol=5e-5, msg=name)


@pytest.mark.parametrize("zero", ["zero1.json", "zero3.json"])
@pytest.mark.parametrize("teacher_sharded", [False, True], ids=["whole", "sharded"])
def test_distillation_on_two_ranks_equals_one_rank_with_twice_the_micro_batch(tmp_path, shards, zero, teacher_sharded):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training(micro_batch=8))
    settings = jobs.training(micro_batch=4, teacher_sharded=teacher_sharded)
    assert_same(one, run(tmp_path, "two", 2, jobs.distill, shards, zero, settings))


def test_an_untied_head_trains_under_zero3(tmp_path, shards):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training(), False)
    two = run(tmp_path, "two", 2, jobs.distill, shards, "zero3.json", jobs.training(), False)
    assert "student.lm_head.weight" in one[1]
    assert_same(one, two)


@pytest.mark.parametrize("zero", ["zero1.json", "zero2.json"])
def test_the_fused_step_gives_the_same_weights(tmp_path, shards, zero):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training())
    folder = tmp_path / "fused"
    job = (jobs.with_fused_step, jobs.distill, shards, folder, zero, jobs.training(micro_batch=2))
    weights = run_ranks(2, *job)[0].weights
    assert_same(one, (jobs.losses(folder), weights))


@pytest.mark.parametrize("kept", [0, 2])
def test_accumulation_and_activation_checkpointing_change_nothing(tmp_path, shards, kept):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training())
    small = run(
        tmp_path,
        "small",
        1,
        jobs.distill,
        shards,
        "zero3.json",
        jobs.training(micro_batch=2, activation_checkpointing=True, kept_layers=kept),
    )
    assert_same(one, small)


@pytest.mark.parametrize("job", [jobs.align, jobs.finetune], ids=["align", "finetune"])
def test_the_other_stages_on_two_ranks_equal_one(tmp_path, shards, job):
    one = run(tmp_path, "one", 1, job, shards, "zero1.json", jobs.training())
    assert_same(one, run(tmp_path, "two", 2, job, shards, "zero3.json", jobs.training()))


def test_rope_keeps_its_precision_in_a_bf16_engine():
    frequencies = run_ranks(1, jobs.buffers_under_bf16)[0]
    for buffer, expected in zip(frequencies, jobs.make_teacher().buffers(), strict=True):
        assert torch.equal(buffer, expected)
