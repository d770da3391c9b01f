"""The records of the stages, and what is derived from them."""

import os
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from halo.config import Config
from halo.graph import SIZES, STAGES, Stage, conversion, jobs, stages_to

ROOT = Path(__file__).parents[2]
IN_ROOT = {"cwd": ROOT, "capture_output": True, "text": True}


def ask(*words: str) -> subprocess.CompletedProcess:
    """As slurm/table2.sh asks, but with the standard library alone."""
    command = [sys.executable, "-S", "-m", "halo.graph", *words]
    return subprocess.run(command, env={}, **IN_ROOT)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_record_names_what_there_is(stage: Stage):
    assert find_spec(f"halo.stages.{stage.name}")
    assert f'"{stage.name}"' in (ROOT / "launcher" / stage.launcher).read_text()
    assert not stage.trains or stage.name in {field.name for field in fields(Config)}
    for size in SIZES if stage.script else ():
        assert f"launcher/{stage.launcher}" in (ROOT / "slurm" / stage.script_for(size)).read_text()


def test_every_stage_comes_after_its_inputs():
    names = list(STAGES)
    assert all(names.index(before) < names.index(stage.name) for stage in STAGES.values() for before in stage.inputs)
    assert stages_to("csr", prepare=False) == ["csr"]
    assert stages_to("csr", prepare=True) == ["align", "selection", "distill", "finetune", "scaling", "export", "csr"]


def test_what_table2_asks_is_answered_without_any_package():
    for size, preset in SIZES.items():
        assert ask("preset", size).stdout == f"{preset}\n"
        assert (ROOT / "halo" / "presets" / f"{preset}.toml").is_file()
        lines = [line.split() for line in ask("jobs", size).stdout.splitlines()]
        assert lines == [[stage, script] for script, stage in jobs(size).items()]
    assert ask("jobs", "8b").stdout.startswith("align stage1_8b.sh\nselection selection_8b.sh\ndistill stage2_8b.sh\n")
    assert "export export.sh\nniah niah.sh\ncsr csr.sh\n" in ask("jobs", "8b").stdout
    assert ask("training").stdout.split() == [stage.name for stage in conversion() if stage.trains]


def test_a_size_that_does_not_exist_is_refused():
    for command in (ask("preset", "9b"), subprocess.run(["bash", "slurm/table2.sh", "9b"], **IN_ROOT)):
        assert (command.returncode, command.stdout) == (2, "")
        assert command.stderr == "error: no teacher of size '9b': it is one of 2b, 4b, 8b\n"
    assert ask("preset").stderr == "usage: python -m halo.graph preset SIZE | jobs SIZE | training\n"


def table2(folder: Path, *words: object) -> tuple[list[str], list[str]]:
    """What slurm/table2.sh prints, and the scripts that it submits, to an sbatch that only writes them down."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "sbatch").write_text(f'#!/bin/bash\necho "$@" >>{folder}/typed\nwc -l <{folder}/typed\n')
    (folder / "bin" / "sbatch").chmod(0o755)
    (folder / "typed").unlink(missing_ok=True)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HALO_PYTHON": sys.executable}
    command = ["bash", "slurm/table2.sh", *(str(word) for word in words)]
    done = subprocess.run(command, env=environment, **IN_ROOT)
    typed = (folder / "typed").read_text().splitlines() if (folder / "typed").is_file() else []
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), typed


def test_table2_leaves_out_what_is_finished_or_taken(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    options = ("--run", run, "--from", other, "align", "selection", "--heldout", "texts", "--align.shards", "shards")
    printed, typed = table2(tmp_path, "8b", *options)
    assert printed[:3] == [
        "align: the first job takes it from another run",
        "selection: the first job takes it from another run",
        "distill: job 1",
    ]
    given = " ".join(str(word) for word in options)
    assert typed[0] == f"--parsable slurm/stage2_8b.sh --preset hypenet-9b {given}"
    assert [line.split("slurm/")[1].split()[0] for line in typed[1:]] == [
        *("stage3_8b.sh", "export.sh", "niah.sh", "csr.sh")
    ]
    for stage in ("align", "selection", "distill", "finetune", "export"):
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.json").touch()
    printed, typed = table2(tmp_path, "8b", *options)
    assert printed[:2] == [f"align: done already, in {run}/align", f"selection: done already, in {run}/selection"]
    assert printed[-2:] == ["niah: job 1", "csr: job 2"]
