"""The progress of a run, from folders as stages leave them and a squeue that prints what a test gives it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halo.errors import UserError
from halo.preset import load_config
from halo.status import duration, jobs_of, next_command, stages_in, status_text
from halo.tables import config_table, to_toml

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which commands are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the 9B preset, interrupted in stage 2."""
    run = tmp_path / "run"
    for stage in ("align", "selection", "distill"):
        (run / stage).mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(config_table(load_config("hypenet-9b"))))
    for stage, summary in {"align": {"loss": 0.0125, "seconds": 4000}, "selection": {"seconds": 400}}.items():
        (run / stage / "stage.json").write_text(json.dumps({"summary": summary}))
    lines = [{"step": i, "loss": 0.5, "tokens_per_s": 40000.0, "step_s": 1.2} for i in range(4600)]
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 46')
    checkpoint = run / "distill" / "checkpoints" / "step-000004500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"zero_stage": 3}')
    (checkpoint.parent / "latest").write_text("step-000004500\n")
    hour_ago = time.time() - 3600
    os.utime(run / "distill" / "metrics.jsonl", (hour_ago, hour_ago))
    return run


def install(folder: Path, name: str, *lines: str, status: int = 0) -> None:
    (folder / name).write_text("#!/bin/bash\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
    (folder / name).chmod(0o755)


def job(state: str, typed: str, where: str = "node[1-2]") -> str:
    return f"71|{state}|1:02:03|1-00:00:00|{where}|{ROOT}|{ROOT}/slurm/{typed}"


def states(run: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in stages_in(run, jobs_of(run))}


def test_an_interrupted_run_without_slurm(run):
    text = status_text(run)
    assert "align      complete     loss 0.0125; 67 min" in text
    line = "step 4,600 of 20,000, last checkpoint 4,500; loss 0.5000; 40,000 tokens/s; 5.2 h left; last step 60 min ago"
    assert f"distill    interrupted  {line}" in text
    assert "finetune   missing\n" in text
    command = f"deepspeed launcher/kd.py --preset hypenet-9b --run {run} --ds_config ds_configs/zero3.json"
    assert text.endswith(f"next: {command}\n")


def test_a_stage_whose_last_step_is_recent_runs(run):
    os.utime(run / "distill" / "metrics.jsonl")
    text = status_text(run)
    assert "distill    running      step 4,600 of 20,000" in text
    assert "next: nothing: distill is running" in text


def test_a_run_on_slurm(run, programs):
    install(programs, "sbatch")
    install(programs, "squeue")
    (run / "slurm").mkdir()
    assert f"next: sbatch slurm/stage2_8b.sh --preset hypenet-9b --run {run}\n" in status_text(run)

    logs = run / "slurm" / "hypenet-9b-stage2-71"
    logs.mkdir()
    (logs / "rank-0.log").touch()
    install(programs, "squeue", job("RUNNING", f"stage2_8b.sh --run {run} --distill.lr 5e-5"))
    text = status_text(run)
    assert "distill    running " in text
    assert "job 71 runs on node[1-2], 1:02:03 of 1-00:00:00\n" in text
    assert f"next: nothing: distill is running; tail -f {logs}/rank-0.log\n" in text

    install(programs, "squeue", job("PENDING", f"stage3_8b.sh --run={run}", "(Dependency)"))
    assert states(run)["finetune"] == "queued"
    assert states(run)["distill"] == "interrupted"
    assert "job 71 pending (Dependency)\n" in status_text(run)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("stage2_8b.sh", True),
        ("stage2_8b.sh --distill.lr 5e-5", True),
        ("stage2_2b.sh", False),
        ("stage2_2b.sh --preset hypenet-9b", True),
        ("stage2_8b.sh --run runs/other", False),
        ("niah.sh --preset hypenet-9b", True),
        ("csr.sh --preset hypenet-9b", True),
        ("prepare_data.sh --out shards/align", False),
    ],
)
def test_the_run_that_a_job_works_on(programs, monkeypatch, typed, ours):
    """Where no --run was typed, it is the script's preset's."""
    monkeypatch.delenv("HALO_RUNS", raising=False)
    install(programs, "squeue", job("PENDING", typed, "(Priority)"))
    assert [found.id for found in jobs_of(ROOT / "runs" / "hypenet-9b")] == ["71"] * ours


def test_a_job_of_two_stages_is_at_the_one_whose_inputs_are_there(run, programs):
    for stage in ("distill", "finetune"):
        (run / stage).mkdir(exist_ok=True)
        (run / stage / "stage.json").write_text('{"summary": {}}')
    install(programs, "squeue", job("RUNNING", f"export.sh --preset hypenet-9b --run {run}"))
    assert (states(run)["scaling"], states(run)["export"]) == ("running", "queued")


def test_a_run_whose_data_is_being_prepared(run, programs, tmp_path):
    """As slurm/table2.sh submits it, before the run's folder is there and after."""
    new = tmp_path / "new"
    data = f"prepare_data.sh --out shards --preset hypenet-9b --run {new}"
    stage = f"stage1_8b.sh --preset hypenet-9b --run {new}"
    install(programs, "squeue", job("RUNNING", data), job("PENDING", stage, "(Dependency)"))
    assert status_text(new) == (
        f"{new}: not begun\n"
        "  prepare_data.sh      job 71 runs on node[1-2], 1:02:03 of 1-00:00:00\n"
        "  stage1_8b.sh         job 71 pending (Dependency)\n"
        "next: nothing: its jobs are in the queue\n"
    )
    install(programs, "squeue", job("RUNNING", data.replace(str(new), str(run))))
    assert f"\n  {'data':<23} job 71 runs on node[1-2]" in status_text(run)


def test_a_complete_run(run):
    for stage in ("distill", "finetune", "scaling", "export", "niah", "csr"):
        (run / stage).mkdir(exist_ok=True)
        (run / stage / "stage.json").write_text('{"summary": {}}')
    assert "the run is complete" in next_command(run, stages_in(run, None))


def test_a_stage_of_another_run_and_pretraining_are_shown(run):
    (run / "align" / "stage.json").write_text('{"summary": {"seconds": 30}, "taken_from": "/runs/other"}')
    text = status_text(run)
    assert "align      complete     30 s; taken from /runs/other\n" in text
    assert "pretrain" not in text
    (run / "pretrain").mkdir()
    text = status_text(run)
    assert "\n  pretrain   interrupted\n" in text
    assert "next: deepspeed launcher/pretrain.py --preset" in text


def test_a_slurm_that_does_not_answer_is_said(run, programs):
    install(programs, "squeue", status=1)
    (programs / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error: no contact' >&2\nexit 1\n")
    text = status_text(run)
    assert "its jobs are not known: squeue failed: slurm_load_jobs error: no contact\n" in text
    assert "distill    interrupted" in text


def test_no_run_and_damaged_files_are_one_line(run, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"no run in .*: give the folder that a launcher's --run names"):
            status_text(folder)
    (run / "align" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"align/stage\.json is not valid JSON"):
        status_text(run)


def test_the_command_answers_without_torch(run):
    python = [sys.executable, "-X", "importtime", "launcher/status.py"]
    done = subprocess.run([*python, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == status_text(run)
    assert not {line.split("|")[-1].strip() for line in done.stderr.splitlines()} & {"torch", "transformers"}
    wrong = subprocess.run(
        [sys.executable, "launcher/status.py", "runs/none"], cwd=ROOT, capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: no run in runs/none")


def test_durations():
    assert [duration(seconds) for seconds in (42, 400, 7300)] == ["42 s", "7 min", "2.0 h"]
