"""The record of a stage: lines of metrics.jsonl, TensorBoard's files, waits, MFU and the profiler's trace."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from halo.errors import UserError
from halo.training import metrics as module
from halo.training.gpus import GPUS, find_gpu, gpu_of_device
from halo.training.metrics import Metrics, max_over_ranks
from tests.distributed.ranks import run_ranks


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder: Path, steps: int = 3, first: int = 0, **arguments) -> None:
    metrics = Metrics(folder, name="distill", steps=steps, step=first, **arguments)
    for step in range(first, steps):
        metrics.log(step, {"loss": 2.0 - step, "lr": 0.1, "gradient_norm": 3.0}, tokens=128)
    metrics.close()


def test_a_line_a_step(tmp_path):
    record(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, 1.0, 0.0]
    assert [line["tokens"] for line in lines(tmp_path)] == [128, 256, 384]
    for line in lines(tmp_path):
        assert line["tokens_per_s"] == pytest.approx(128 / line["step_s"])
        assert line["tokens_per_s_gpu"] == line["tokens_per_s"]
        assert line["peak_gib"] > 0
        assert (line["lr"], line["gradient_norm"]) == (0.1, 3.0)
        assert "mfu" not in line  # a CPU has no peak


def test_tensorboard_has_what_the_lines_have(tmp_path):
    record(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == lines(tmp_path)[0].keys() - {"step"}
    assert [event.value for event in events.Scalars("loss")] == [2.0, 1.0, 0.0]
    assert [event.step for event in events.Scalars("tokens")] == [0, 1, 2]


def test_after_a_resume_later_lines_are_dropped_and_tokens_go_on(tmp_path):
    record(tmp_path, steps=4)
    record(tmp_path, steps=3, first=2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert lines(tmp_path)[-1]["tokens"] == 3 * 128


def test_after_a_rewind_later_lines_are_dropped_and_waits_are_forgotten(tmp_path):
    metrics = Metrics(tmp_path, name="distill", steps=4)
    for step in range(3):
        metrics.log(step, {"loss": 2.0 - step}, tokens=128)
    with metrics.waiting("data"):
        pass
    metrics.rewind(1)
    metrics.log(1, {"loss": 9.0}, tokens=128)
    metrics.close()
    assert [(line["step"], line["loss"], line["tokens"]) for line in lines(tmp_path)] == [(0, 2.0, 128), (1, 9.0, 256)]
    assert "data_wait_s" not in lines(tmp_path)[1]


def test_whatever_the_trainer_adds_is_recorded_and_what_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path, name="distill", steps=1)
    values = {"loss": float("nan"), "gradient_norm": float("inf"), "skipped": 1, "relative/3": 0.5}
    metrics.log(0, values, tokens=128)
    metrics.close()
    (line,) = lines(tmp_path)
    assert (line["loss"], line["gradient_norm"], line["skipped"], line["relative/3"]) == (None, None, 1, 0.5)


def test_waits_are_added_up_within_a_step_and_belong_to_it(tmp_path):
    metrics = Metrics(tmp_path, name="distill", steps=2)
    for _ in range(2):
        with metrics.waiting("data"):
            time.sleep(0.02)
    with metrics.waiting("teacher"):
        pass
    metrics.log(0, {"loss": 1.0}, tokens=128)
    metrics.log(1, {"loss": 1.0}, tokens=128)
    metrics.close()
    first, second = lines(tmp_path)
    assert 0.04 <= first["data_wait_s"] <= first["step_s"]
    assert 0 <= first["teacher_wait_s"] < 0.02
    assert "data_wait_s" not in second


def test_a_pause_belongs_to_no_step(tmp_path):
    metrics = Metrics(tmp_path, name="distill", steps=2)
    metrics.log(0, {"loss": 1.0}, tokens=128)
    with metrics.pause("checkpoint"):
        time.sleep(0.1)
    metrics.log(1, {"loss": 1.0}, tokens=128)
    metrics.close()
    first, second = lines(tmp_path)
    assert "checkpoint_s" not in first
    assert second["checkpoint_s"] >= 0.1
    assert second["step_s"] < 0.1


def test_mfu_is_useful_flops_over_the_peak(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "peak_flops", lambda: 2e12)
    record(tmp_path, flops_per_token=3e6)
    for line in lines(tmp_path):
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * 3e6 / 2e12)
    assert "MFU=" in capsys.readouterr().err


def test_the_bar_shows_loss_and_speed(tmp_path, capsys):
    record(tmp_path)
    shown = capsys.readouterr().err
    assert "distill" in shown
    assert "loss=0.0000, tokens/s=" in shown
    assert "MFU" not in shown
    assert "held-out" not in shown


def test_the_bar_shows_what_was_last_probed(tmp_path, capsys):
    metrics = Metrics(tmp_path, name="distill", steps=2)
    probed = {
        "probe/kl": 0.25,
        "probe/cross_entropy": 2.0,
        "probe/niah_single_1/256": 1.0,
        "probe/niah_single_1/512": 0.5,
    }
    metrics.log(0, {"loss": 1.0} | probed, tokens=1)
    metrics.log(1, {"loss": 0.5}, tokens=1)
    metrics.close()
    assert "loss=0.5000" in (shown := capsys.readouterr().err)
    assert shown.rpartition("loss=0.5000")[2].count("held-out kl=0.2500, recall=100%/50%") == 1


def test_a_gpu_is_known_by_the_name_of_its_driver_or_not_at_all():
    assert gpu_of_device("NVIDIA H200") == find_gpu("H200")
    assert gpu_of_device("NVIDIA A100-SXM4-80GB").peak == 312e12
    for unknown in ("NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-32GB"):
        assert gpu_of_device(unknown) is None
    assert len({gpu.device for gpu in GPUS.values()}) == len(GPUS)
    with pytest.raises(UserError, match=r"no GPU 'rtx409' \(did you mean 'rtx4090'\?\); known: a100-40gb, a100, "):
        find_gpu("rtx409")


def traced(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tensorboard").glob("*.pt.trace.json.gz"))


def test_the_profiler_writes_a_trace_of_the_steps_asked_for(tmp_path):
    record(tmp_path, steps=4, profile_from=1, profile_steps=2)
    assert traced(tmp_path) == ["steps-1-2.pt.trace.json.gz"]
    with gzip.open(tmp_path / "tensorboard" / traced(tmp_path)[0]) as file:
        assert json.load(file)["traceEvents"]


def test_the_profiler_may_begin_with_the_first_step_and_outlast_the_last(tmp_path):
    record(tmp_path, steps=2, profile_from=0, profile_steps=9)
    assert traced(tmp_path) == ["steps-0-8.pt.trace.json.gz"]


def test_nothing_is_traced_by_default_nor_after_a_resume_past_it(tmp_path):
    record(tmp_path / "default")
    assert traced(tmp_path / "default") == []
    record(tmp_path / "resumed", steps=5, first=3, profile_from=1, profile_steps=9)
    assert traced(tmp_path / "resumed") == []


def two_ranks(folder: Path) -> dict[str, float]:
    """Each rank waits as long as its number says; returns this rank's view of the greatest."""
    metrics = Metrics(folder, name="align", steps=1)
    with metrics.waiting("data"):
        time.sleep(0.2 * dist.get_rank())
    metrics.log(0, {"loss": 1.0}, tokens=128)
    metrics.close()
    return max_over_ranks({"rank": float(dist.get_rank()), "minus": -float(dist.get_rank())})


def test_the_slowest_rank_is_what_is_recorded_and_rank_0_writes(tmp_path):
    assert run_ranks(2, two_ranks, tmp_path) == [{"rank": 1.0, "minus": 0.0}] * 2
    (line,) = lines(tmp_path)
    assert line["data_wait_s"] >= 0.2
    assert line["tokens_per_s_gpu"] == pytest.approx(line["tokens_per_s"] / 2)
