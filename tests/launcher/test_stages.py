"""Stages as the pipeline sees them: a made-up one, and finished ones that another run takes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from halo.context import Context
from halo.errors import UserError
from halo.graph import STAGES, Stage, jobs
from halo.job import Job
from halo.pipeline import run_stages
from halo.preset import load_config
from halo.run import sha256
from halo.status import status_text
from tests.distributed.ranks import run_ranks
from tests.halo.data.test_locks import HOLD
from tests.launcher.conftest import ROOT, SMALL, TEACHER

ROPE = ("--architecture.attn_use_rope", "true")


def run_in(run: Path, stage: str, *overrides: str, other: Path | None = None, taken: Sequence[str] = ()) -> None:
    """Run a stage of the demo's preset in `run`, with the finished stages `taken` from the run in `other`."""
    config = load_config("tiny", [*SMALL, *overrides], recorded=run / "config.toml")
    ds_config = ROOT / "ds_configs" / "zero1.json"
    stages = {"stages": (stage,), "taken_from": other, "taken_stages": tuple(taken)}
    run_stages(Job(config=config, run=run, ds_config=ds_config, **stages))


def record(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "stage.json").read_text())


# A made-up evaluation


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One record and one module make a stage. The list has the runs in which it ran."""
    runs: list[Path] = []

    def run(context: Context) -> None:
        folder = context.folder("perplexity")
        folder.save_json("perplexity.json", {"perplexity": 7.5})
        folder.complete(["perplexity.json"], {"seconds": 3.0})
        runs.append(context.run)

    module = ModuleType("halo.stages.perplexity")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made_up = Stage(
        name="perplexity", inputs=("export",), launcher="perplexity.py", script="perplexity.sh", sees=("heldout",)
    )
    monkeypatch.setitem(STAGES, "perplexity", made_up)
    monkeypatch.setenv("PATH", "")  # a Slurm of this machine is not asked
    return runs


def test_a_made_up_evaluation_is_one_record_and_one_module(demo, tmp_path, measured, capsys):
    run = shutil.copytree(demo[0], tmp_path / "run")
    assert f"missing\nnext: deepspeed launcher/csr.py --preset tiny --run {run}\n" in status_text(run)

    run_in(run, "perplexity")
    assert measured == [run]
    assert record(run, "perplexity")["made_from"].keys() == {"teacher", "heldout", "held-out text", "export"}
    assert "perplexity complete     3 s\n" in status_text(run)

    run_in(run, "perplexity")
    assert measured == [run]
    assert f"perplexity: done already, in {run / 'perplexity'}\n" in capsys.readouterr().out

    changed = record(run, "perplexity")
    changed["made_from"]["heldout"] = "other/"
    (run / "perplexity" / "stage.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="perplexity was made from another heldout"):
        run_in(run, "perplexity")
    assert list(jobs("8b").items())[-1] == ("perplexity.sh", "perplexity")


def test_the_inputs_of_a_made_up_evaluation_are_checked(demo, tmp_path, measured):
    run = shutil.copytree(demo[0], tmp_path / "run")
    (run / "export" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run_in(run, "perplexity")
    shutil.rmtree(run / "export")
    with pytest.raises(UserError, match=r"perplexity needs .*/export, which is missing: run launcher/export\.py first"):
        run_in(run, "perplexity")
    assert measured == []


# Who works on a run, and what was killed


def test_a_run_that_another_command_works_on(demo, tmp_path):
    """What is finished is not refused: nothing is written for it."""
    run = shutil.copytree(demo[0], tmp_path / "run")
    shutil.rmtree(run / "export")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match=rf"another process works on {run} \(process {other.pid} on "):
            run_in(run, "export")
        run_in(run, "distill")
        other.kill()
    (run / ".lock").unlink()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_checkpoints_that_a_killed_command_did_not_remove(demo, tmp_path):
    run = shutil.copytree(demo[0], tmp_path / "run")
    for stage in ("align", "distill"):
        (run / stage / "checkpoints" / "step-000000002").mkdir(parents=True)
    run_in(run, "distill")
    assert not list(run.rglob("checkpoints"))


# Stages of another run


def refusal(run: Path, *overrides: str, other: Path, taken: Sequence[str] = ("align", "selection")) -> str:
    """Why stages cannot be taken into a run: one line, and nothing of the run has changed."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        run_in(run, "distill", *overrides, other=other, taken=taken)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "\n" not in str(error.value)
    return str(error.value)


def distill_with_rope(run: Path, other: Path) -> None:
    run_in(run, "distill", *ROPE, other=other, taken=["selection", "align"])


def test_an_ablation_takes_the_stages_that_do_not_see_its_switch(demo, tmp_path, monkeypatch):
    """Stage 2 is trained with the switch, on stage 1 and selection of the run without it."""
    other, run = demo[0], tmp_path / "rope"
    run_ranks(1, distill_with_rope, run, other)
    for stage in ("align", "selection"):
        theirs, ours = record(other, stage), record(run, stage)
        assert ours == theirs | {"taken_from": str(other)}
        for name in ours["files"]:
            assert (run / stage / name).samefile(other / stage / name)
    assert json.loads((run / "distill" / "hybrid" / "config.json").read_text())["attn_use_rope"]
    assert "taken_from" not in record(run, "distill")
    monkeypatch.setenv("PATH", "")
    assert f"; taken from {other}\n" in status_text(run)
    kept = json.loads((run / "selection" / "scores.json").read_text())["attention_layers"]
    weights, plain = (load_file(at / "distill" / "hybrid" / "model.safetensors") for at in (run, other))
    name = f"model.layers.{kept[-1]}.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], plain[name])


@pytest.fixture
def other(demo, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(demo[0], tmp_path / "other")


def test_where_there_are_no_links_files_are_copied(other, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    run, stages = tmp_path / "run", ("align", "selection", "distill")
    run_in(run, "distill", other=other, taken=stages)
    printed = capsys.readouterr().out
    assert all(f"{stage}: taken from {other}\n" in printed for stage in stages)
    shutil.rmtree(other)
    run_in(run, "distill", other=other, taken=stages)
    assert f"distill: done already, in {run / 'distill'}, taken from {other}\n" in capsys.readouterr().out
    assert not list(run.rglob("*.partial"))


def test_what_cannot_be_taken_leaves_nothing_behind(other, tmp_path):
    run = tmp_path / "run"
    assert refusal(run, other=other, taken=["selection"]) == (
        f"selection of {other} cannot be taken without align, which it was made from: "
        f"pass --from {other} align selection"
    )
    assert refusal(run, *ROPE, other=other, taken=["align", "selection", "distill"]) == (
        f"{other}/distill was made from another attn_use_rope (False, now True): give this run the same, "
        "or leave distill out of --from"
    )
    assert "align was made from another steps (2, now 3)" in refusal(run, "--align.steps", "3", other=other)
    assert "align was made from another lightning_use_rope (True, now False)" in refusal(
        run, "--architecture.lightning_use_rope", "false", other=other
    )
    teacher = shutil.copytree(TEACHER, tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert "align was made from another teacher: " in refusal(run, "--teacher", str(teacher), other=other)
    assert "distill needs" in refusal(run, other=other, taken=["align"])
    shutil.rmtree(other / "selection")
    assert f"{other}/selection is not finished: --from names the folder of a run" in refusal(run, other=other)
    assert f"no run in {other}/align (no config.toml)" in refusal(run, other=other / "align")
    mixers = other / "align" / "mixers.safetensors"
    mixers.write_bytes(mixers.read_bytes()[:-1] + b"\1")
    assert f"{mixers} is damaged (not what its stage wrote): it cannot be taken" in refusal(run, other=other)
    assert not run.exists()


def test_a_run_keeps_the_stages_that_it_has(demo, other, tmp_path):
    run = shutil.copytree(demo[0], tmp_path / "run")
    assert refusal(run, other=run) == f"--from {run} is this run's own folder: name another run"
    run_in(run, "distill", other=other, taken=["align", "selection"])  # the same: nothing to do
    assert "taken_from" not in record(run, "align")
    scores = other / "selection" / "stage.json"
    changed = record(other, "selection")
    changed["made_from"]["seed"] = 5
    scores.write_text(json.dumps(changed))
    assert refusal(run, other=other) == (
        f"{run}/selection differs from {other}/selection: remove it, or leave selection out of --from"
    )
    (run / "selection" / "stage.json").unlink()
    assert f"{run}/selection was interrupted: remove it" in refusal(run, other=other)


def test_later_stages_notice_a_record_that_was_altered_with_its_files(other):
    weights, changed = other / "align" / "mixers.safetensors", record(other, "align")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed["files"][weights.name]["sha256"] = sha256(weights)
    (other / "align" / "stage.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="selection was made from another align: remove that folder"):
        run_in(other, "distill")
