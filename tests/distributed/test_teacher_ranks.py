"""Training with a dedicated teacher is training with a colocated one."""

from dataclasses import replace
from pathlib import Path

import pytest

from halo.errors import UserError
from tests.distributed import fault_jobs, jobs
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resuming import assert_equal
from tests.distributed.test_training import assert_same

STEPS = 20
SETTINGS = jobs.training(steps=STEPS, micro_batch=4)
ZERO = "zero3.json"


def dedicated(teachers: int, **changes) -> jobs.Distill:
    return replace(SETTINGS, teacher_placement="dedicated", teacher_ranks=teachers, **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shards: Path):
    """Losses and weights of one rank that holds teacher and student."""
    folder = tmp_path_factory.mktemp("alone")
    weights = run_ranks(1, jobs.distill, shards, folder, ZERO, SETTINGS)[0].weights
    return jobs.losses(folder), weights


def run(folder: Path, shards: Path, teacher: Path, students: int, settings: jobs.Distill):
    ranks = students + settings.teacher_ranks
    results = run_ranks(ranks, jobs.dedicated, shards, folder, ZERO, settings, teacher, split=settings)
    assert results[students:] == [None] * settings.teacher_ranks
    return jobs.losses(folder), results[0].weights


@pytest.mark.parametrize("teacher_sharded", [False, True], ids=["whole", "sharded"])
def test_a_colocated_teacher(tmp_path, shards, alone, teacher_sharded):
    settings = replace(SETTINGS, teacher_sharded=teacher_sharded)
    weights = run_ranks(2, jobs.distill, shards, tmp_path, ZERO, settings)[0].weights
    assert_same(alone, (jobs.losses(tmp_path), weights), steps=STEPS)


@pytest.mark.parametrize(
    ("students", "settings"),
    [(1, dedicated(1)), (2, dedicated(1)), (2, dedicated(2, teacher_sharded=True))],
    ids=["1+1", "2+1", "2+2 sharded"],
)
def test_a_dedicated_teacher(tmp_path, shards, alone, teacher, students, settings):
    assert_same(alone, run(tmp_path, shards, teacher, students, settings), steps=STEPS)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_logits": "full"},
        {"teacher_logits": "top_k", "teacher_top_k": 8, "temperature": 2.0},
        {"teacher_fp8": True},
    ],
    ids=["full", "top_k", "fp8"],
)
def test_each_form_of_the_logits_is_the_same_from_either_place(tmp_path, shards, alone, teacher, changes):
    settings = replace(SETTINGS, steps=6, **changes)
    weights = run_ranks(1, jobs.distill, shards, tmp_path / "colocated", ZERO, settings)[0].weights
    there = run(tmp_path / "dedicated", shards, teacher, 1, dedicated(1, **changes, steps=6))
    here = jobs.losses(tmp_path / "colocated"), weights
    assert_same(here, there)
    if changes.get("teacher_fp8"):
        assert here[0] != pytest.approx(alone[0][:6], rel=1e-4)
    if changes.get("teacher_logits") == "full":
        same = 4  # then the learning rates part: it falls faster where there are fewer steps
        assert here[0][:same] == pytest.approx(alone[0][:same], rel=1e-5)


def test_a_run_with_a_dedicated_teacher_resumes_exactly(tmp_path, shards, teacher):
    """The checkpoint's position in the data is the one before the prefetched batch."""
    settings = dedicated(1, steps=6, save_every=2)
    whole = run(tmp_path / "whole", shards, teacher, 2, settings)
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(
            *(3, fault_jobs.interrupted, 5, jobs.dedicated, shards, tmp_path / "parts", ZERO, settings, teacher),
            split=settings,
        )
    losses, weights = run(tmp_path / "parts", shards, teacher, 2, settings)
    assert losses == whole[0]
    assert_equal(weights, whole[1])


def test_a_teacher_that_cannot_be_loaded_ends_the_students_too(tmp_path, shards, teacher):
    broken = jobs.save_teacher(tmp_path / "teacher")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        run(tmp_path / "run", shards, broken, 1, dedicated(1))
