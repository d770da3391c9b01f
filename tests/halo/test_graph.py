"""The records of the stages, and what is derived from them."""

import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from halo.config import Config
from halo.graph import SIZES, STAGES, Stage, conversion, jobs, stages_to

ROOT = Path(__file__).parents[2]


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """As slurm/table2.sh asks, but with the standard library alone."""
    command = [sys.executable, "-S", "-m", "halo.graph", *words]
    return subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True)


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
    done = ask("preset", "9b")
    assert (done.returncode, done.stdout) == (2, "")
    assert "2b|4b|8b" in done.stderr
