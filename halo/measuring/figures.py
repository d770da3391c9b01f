"""The figures that a stage measures: each is saved at once, so that a stage that was stopped or killed can resume.

    with measuring(folder, samples=1000, label="niah") as measure:
        recall = measure("recall", 500, partial(needle_recall, model, needles, batch=1))

For stages that only measure. The checkpoints of training are in halo/training/checkpoint.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from halo.distributed import all_sum, on_rank0
from halo.errors import Stopped, UserError
from halo.json_files import read_json
from halo.progress import progress_bar
from halo.run import StageFolder, difference
from halo.stop import stop_requests

FIGURES = "checkpoints/figures.json"
"""In the stage's folder, until the stage is complete."""


class Measure:
    """Measures a figure, or returns it if it is saved already. Called on every rank, with the same arguments."""

    def __init__(self, folder: StageFolder, bar: tqdm, asked_to_stop: Callable[[], bool]):
        self._folder, self._bar, self._asked_to_stop = folder, bar, asked_to_stop
        self._figures, seconds = on_rank0(_load_figures, folder)
        self._began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Spent on measuring so far, in all starts of the stage."""
        return round(time.perf_counter() - self._began, 1)

    def __call__(self, name: str, samples: int, measure: Callable[..., float]) -> float:
        """The figure `name`.

        Args:
            name: unique in the stage.
            samples: how far the bar advances if the figure is saved already.
            measure: returns the figure, the same on every rank. Its argument `progress` is a ProgressCallback
                (halo/measuring/evaluation.py).

        Raises:
            Stopped: a signal came to some rank (halo/stop.py). This figure is lost, those before it are saved.
        """
        if name in self._figures:
            self._bar.update(samples)
        else:
            self._figures[name] = measure(progress=self._advance)
            saved = {"made_from": self._folder.made_from, "seconds": self.seconds, "figures": self._figures}
            on_rank0(_save_figures, self._folder, saved)
        return self._figures[name]

    def _advance(self, samples: int) -> None:
        self._bar.update(samples)
        if all_sum(torch.tensor(int(self._asked_to_stop()))).item():
            raise Stopped(f"{self._folder.name}: stopped, with {len(self._figures)} figures measured and kept")


@contextmanager
def measuring(folder: StageFolder, samples: int | None, label: str) -> Iterator[Measure]:
    """Within the block, a signal stops the measurement, and one bar counts samples.

    Args:
        samples: of all figures together; None if unknown.
        label: of the bar.

    Raises:
        UserError: the stage's folder has figures of other settings, or they cannot be read.
    """
    with stop_requests() as asked_to_stop, progress_bar(samples, label, unit="sample") as bar:
        yield Measure(folder, bar, asked_to_stop)


@dataclass(frozen=True, kw_only=True)
class _Saved:
    made_from: dict[str, Any]
    figures: dict[str, float]
    seconds: float


def _load_figures(folder: StageFolder) -> tuple[dict[str, float], float]:
    """The saved figures, and the seconds spent on measuring them."""
    path = folder.path / FIGURES
    if not path.is_file():
        return {}, 0.0
    saved: _Saved = read_json(path, _Saved, "remove it to measure anew")
    if saved.made_from != folder.made_from:
        raise UserError(
            f"{path} was measured with another {difference(saved.made_from, folder.made_from)}: remove it to measure "
            "anew, or choose another --run"
        )
    return saved.figures, saved.seconds


def _save_figures(folder: StageFolder, saved: dict[str, Any]) -> None:
    folder.save_json(FIGURES, saved)
