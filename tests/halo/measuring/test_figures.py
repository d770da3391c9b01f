"""Figures are saved one by one: a stage that was stopped or killed resumes, one with other settings is refused."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from halo.errors import Stopped, UserError
from halo.measuring.figures import FIGURES, measuring
from halo.run import StageFolder


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "run" / "niah", {"samples": 3})


def figure(value: float, asked: list[float], signalled: bool = False) -> Callable[..., float]:
    def measure(progress: Callable[[int], None]) -> float:
        asked.append(value)
        if signalled:
            signal.raise_signal(signal.SIGTERM)
        progress(1)
        return value

    return measure


def test_a_killed_stage_measures_the_rest_alone(folder: StageFolder) -> None:
    asked: list[float] = []
    with pytest.raises(KeyboardInterrupt), measuring(folder, 3, "test") as measure:
        assert measure("one", 1, figure(0.1, asked)) == 0.1
        assert measure("two", 1, figure(2 / 3, asked)) == 2 / 3
        raise KeyboardInterrupt
    with measuring(folder, 3, "test") as measure:
        assert measure("one", 1, figure(7, asked)) == 0.1
        assert measure("two", 1, figure(7, asked)) == 2 / 3  # to the last bit
        assert measure("three", 1, figure(0.3, asked)) == 0.3
    assert asked == [0.1, 2 / 3, 0.3]


def test_seconds_count_all_starts(folder: StageFolder) -> None:
    folder.save_json(FIGURES, {"made_from": folder.made_from, "seconds": 1000.0, "figures": {}})
    with measuring(folder, 1, "test") as measure:
        assert 1000 <= measure.seconds < 1060


def test_a_signal_ends_what_is_being_measured(folder: StageFolder) -> None:
    asked: list[float] = []
    with (
        pytest.raises(Stopped, match=r"^niah: stopped, with 1 figures measured and kept$"),
        measuring(folder, 2, "test") as measure,
    ):
        measure("one", 1, figure(1, asked))
        measure("two", 1, figure(2, asked, signalled=True))
    assert json.loads((folder.path / FIGURES).read_text())["figures"] == {"one": 1}


def test_figures_of_other_settings_are_refused(folder: StageFolder) -> None:
    with measuring(folder, 1, "test") as measure:
        measure("one", 1, figure(1, []))
    other = StageFolder(folder.path, {"samples": 4})
    with pytest.raises(UserError, match=r"figures.json was measured with another samples \(3, now 4\)"):
        measuring(other, 1, "test").__enter__()
    for damaged in ("{", "[]", '{"figures": 3}'):
        (folder.path / FIGURES).write_text(damaged)
        with pytest.raises(UserError, match=r"figures.json is not valid.*: remove it to measure anew"):
            measuring(folder, 1, "test").__enter__()


def test_figures_that_cannot_be_written(folder: StageFolder) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("no folder")
    with (
        pytest.raises(UserError, match=r"niah/checkpoints: Not a directory; mend that"),
        measuring(folder, 1, "test") as measure,
    ):
        measure("one", 1, figure(1, []))


def test_a_complete_stage_keeps_none(folder: StageFolder) -> None:
    with measuring(folder, 1, "test") as measure:
        measure("one", 1, figure(1, []))
    folder.complete([], {})
    assert not (folder.path / FIGURES).exists()
