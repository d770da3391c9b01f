"""Evaluation amid training measures what it says, on any ranks, and training is the same numbers without it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import fault_jobs, jobs
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resuming import assert_equal
from tests.distributed.test_training import assert_same

PLAIN = jobs.training(micro_batch=4, save_every=2)
SETTINGS = replace(PLAIN, probe_every=2)


def probes(folder: Path) -> dict[int, dict[str, float]]:
    """What was probed, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        probed = {name: value for name, value in line.items() if name.startswith("probe/")}
        assert ("probe_s" in line) == bool(probed)
        if probed:
            found[line["step"]] = probed
    return found


def assert_alike(one: dict[int, dict[str, float]], two: dict[int, dict[str, float]]) -> None:
    assert one.keys() == two.keys()
    for step, probed in one.items():
        assert two[step] == pytest.approx(probed, rel=1e-5), step


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, shards: Path):
    """The folder, losses and weights of stage 2 on one rank."""
    folder = tmp_path_factory.mktemp("one")
    weights = run_ranks(1, jobs.distill, shards, folder, "zero1.json", SETTINGS)[0].weights
    return folder, jobs.losses(folder), weights


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, shards: Path):
    """The same on two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("two")
    weights = run_ranks(2, jobs.distill, shards, folder, "zero3.json", SETTINGS)[0].weights
    return folder, jobs.losses(folder), weights


@pytest.mark.parametrize(("run", "ranks", "zero"), [("one", 1, "zero1.json"), ("two", 2, "zero3.json")])
def test_training_is_bit_identical_without_it(request, tmp_path, shards, run, ranks, zero):
    _, losses, weights = request.getfixturevalue(run)
    plain = run_ranks(ranks, jobs.distill, shards, tmp_path, zero, PLAIN)[0].weights
    assert jobs.losses(tmp_path) == losses
    assert_equal(weights, plain)
    assert probes(tmp_path) == {}


@torch.no_grad()
def test_figures_are_those_of_plain_torch(one):
    folder, _, weights = one
    teacher, text = jobs.make_teacher(), jobs.probe_text()
    student = jobs.make_student(teacher).eval()
    student.load_state_dict({name.removeprefix("student."): weight for name, weight in weights.items()}, strict=False)
    (log_p, log_q), targets = (
        [model.eval()(text.windows).logits.float().log_softmax(-1) for model in (teacher.float(), student)],
        text.windows[:, 1:],
    )
    expected = {
        "probe/kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item(),
        "probe/cross_entropy": F.nll_loss(log_q[:, :-1].flatten(0, 1), targets.flatten()).item(),
        "probe/teacher_entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
        "probe/agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
    }
    for name, samples in text.needles.items():
        hits = 0
        for sample in samples:
            logits = student(torch.tensor([sample.prompt_ids + sample.answer_ids])).logits[0]
            hits += logits[len(sample.prompt_ids) - 1 : -1].argmax(-1).tolist() == sample.answer_ids
        expected[f"probe/{name}"] = hits / len(samples)
    assert probes(folder)[5] == pytest.approx(expected, rel=1e-4)
    assert list(probes(folder)) == [1, 3, 5]
    assert any(value > 0 for name, value in expected.items() if "niah" in name)


def test_zero3_on_two_ranks(one, two):
    assert_same(one[1:], two[1:])
    assert_alike(probes(one[0]), probes(two[0]))


def test_a_dedicated_teacher_and_one_that_is_sharded(one, tmp_path, shards):
    sharded = replace(SETTINGS, teacher_sharded=True)
    run_ranks(2, jobs.distill, shards, tmp_path / "sharded", "zero2.json", sharded)
    assert_alike(probes(one[0]), probes(tmp_path / "sharded"))
    dedicated = replace(SETTINGS, micro_batch=2, teacher_placement="dedicated", teacher_ranks=1)
    job = (jobs.dedicated, shards, tmp_path / "dedicated", "zero1.json", dedicated, jobs.save_teacher(tmp_path / "t"))
    run_ranks(3, *job, split=dedicated)
    assert_alike(probes(one[0]), probes(tmp_path / "dedicated"))


def test_ranks_that_share_sequences(one, tmp_path, shards):
    run_ranks(2, jobs.distill, shards, tmp_path, "zero3.json", replace(SETTINGS, sequence_parallel=2))
    assert_alike(probes(one[0]), probes(tmp_path))


def test_an_interrupted_run_has_the_same_figures(two, tmp_path, shards):
    folder, losses, weights = two
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(2, fault_jobs.interrupted, 3, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)
    again = run_ranks(2, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)[0].weights
    assert (jobs.losses(tmp_path), probes(tmp_path)) == (losses, probes(folder))
    assert_equal(weights, again)
