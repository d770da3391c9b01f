"""Every stage under ZeRO on gloo ranks gives what one process gives."""

import json
from pathlib import Path

import pytest
import torch

from halo import trainer
from halo.errors import UserError
from tests.distributed import jobs
from tests.distributed.ranks import run_ranks


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(tmp_path: Path, name: str, ranks: int, job, shards: Path, zero: str, settings, *args):
    folder = tmp_path / name
    weights = run_ranks(ranks, job, shards, folder, zero, settings, *args)[0].weights
    return losses(folder), weights


def assert_same(one, two):
    (losses_one, weights_one), (losses_two, weights_two) = one, two
    assert len(losses_one) == 6
    assert losses_two == pytest.approx(losses_one, rel=1e-5)
    assert weights_one.keys() == weights_two.keys()
    for name, weight in weights_one.items():
        torch.testing.assert_close(weights_two[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", ["zero1.json", "zero3.json"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_distillation_on_two_ranks_equals_one_rank_with_twice_the_micro_batch(tmp_path, shards, zero, placement):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training(micro_batch=8))
    settings = jobs.training(micro_batch=4, teacher_placement=placement)
    assert_same(one, run(tmp_path, "two", 2, jobs.distill, shards, zero, settings))


def test_an_untied_head_trains_under_zero3(tmp_path, shards):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training(), False)
    two = run(tmp_path, "two", 2, jobs.distill, shards, "zero3.json", jobs.training(), False)
    assert "student.lm_head.weight" in one[1]
    assert_same(one, two)


def test_accumulation_and_activation_checkpointing_change_nothing(tmp_path, shards):
    one = run(tmp_path, "one", 1, jobs.distill, shards, "zero1.json", jobs.training())
    small = run(
        tmp_path,
        "small",
        1,
        jobs.distill,
        shards,
        "zero3.json",
        jobs.training(micro_batch=2, activation_checkpointing=True),
    )
    assert_same(one, small)


@pytest.mark.parametrize("job", [jobs.align, jobs.finetune], ids=["align", "finetune"])
def test_the_other_stages_on_two_ranks_equal_one(tmp_path, shards, job):
    one = run(tmp_path, "one", 1, job, shards, "zero1.json", jobs.training())
    assert_same(one, run(tmp_path, "two", 2, job, shards, "zero3.json", jobs.training()))


def test_a_run_that_is_interrupted_goes_on_exactly(tmp_path, shards):
    whole = run(tmp_path, "whole", 2, jobs.distill, shards, "zero3.json", jobs.training(save_every=2))
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(2, interrupted_distill, shards, parts, jobs.training(save_every=2))
    resumed = run_ranks(2, jobs.distill, shards, parts, "zero3.json", jobs.training(save_every=2))[0].weights
    assert losses(parts) == whole[0]
    for name, weight in whole[1].items():
        assert torch.equal(resumed[name], weight), name


def interrupted_distill(shards: Path, folder: Path, settings) -> None:
    """Stage 2 that is stopped as step 5 begins."""
    plain = trainer.learning_rate

    def stop(training, step):
        if step == 5:
            raise RuntimeError("stopped")
        return plain(training, step)

    trainer.learning_rate = stop
    jobs.distill(shards, folder, "zero3.json", settings)


def test_rope_keeps_its_precision_in_a_bf16_engine():
    frequencies = run_ranks(1, jobs.buffers_under_bf16)[0]
    for buffer, expected in zip(frequencies, jobs.make_teacher().buffers(), strict=True):
        assert torch.equal(buffer, expected)


@pytest.fixture
def interrupted(tmp_path, shards) -> Path:
    """A stage's folder with a checkpoint of two ranks after step 3."""
    folder = tmp_path / "stage"
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(2, interrupted_distill, shards, folder, jobs.training(save_every=2))
    return folder


def test_a_checkpoint_goes_on_only_with_its_own_settings_ranks_and_files(interrupted, shards):
    def refusal(ranks: int, **changes) -> str:
        with pytest.raises(UserError) as error:
            run_ranks(ranks, jobs.distill, shards, interrupted, "zero3.json", jobs.training(**changes))
        return str(error.value)

    assert "made with another settings, lr (0.001, now 0.5)" in refusal(2, lr=0.5)
    assert "made with another partition, ranks (2, now 1)" in refusal(1)
    (checkpoint,) = interrupted.glob("checkpoints/step-*")
    shard = next(checkpoint.rglob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{checkpoint} is damaged" in refusal(2)
    (checkpoint / "made_from.json").unlink()
    assert f"{checkpoint} is damaged" in refusal(2)


def test_a_checkpoint_that_was_being_written_is_no_checkpoint(interrupted, shards):
    (whole,) = interrupted.glob("checkpoints/step-*")
    half = whole.with_name("step-000000005.partial")
    half.mkdir()
    run_ranks(2, jobs.distill, shards, interrupted, "zero3.json", jobs.training(save_every=2))
    assert len(losses(interrupted)) == 6
    assert not half.exists()
