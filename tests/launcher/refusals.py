"""What the tests of bad input share: a command that must be refused, and files that are changed for it."""

import json
from pathlib import Path

import pytest

from halo.errors import UserError
from halo.graph import stages_to
from halo.job import Job
from halo.pipeline import run_stages
from halo.preset import load_config
from tests.launcher.conftest import ROOT, SMALL


def refusal(stage: str, run: Path, *overrides: str, ds_config: str = "zero3.json", prepare: bool = False) -> str:
    """The one line that `stage` is refused with. Nothing in the run's folder changes."""
    before = snapshot(run)
    with pytest.raises(UserError) as error:
        config = load_config("tiny", [*SMALL, *overrides])
        stages = tuple(stages_to(stage, prepare))
        run_stages(Job(config=config, run=run, ds_config=ROOT / "ds_configs" / ds_config, stages=stages))
    after = snapshot(run)
    assert {path: after.get(path) for path in before} == before
    assert "\n" not in str(error.value)
    return str(error.value)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
