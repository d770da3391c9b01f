"""Measuring figure after figure: each is kept once it is there, so that a stage that was stopped or killed goes on.

    with measuring(folder, samples=1000, label="evaluate") as measure:
        recall = measure("recall", 500, partial(needle_recall, model, needles, batch=1))

For stages that train nothing: checkpoints of training are in halo/training/checkpoint.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from halo.distributed import all_sum, on_rank0
from halo.errors import Stopped, UserError
from halo.progress import progress_bar
from halo.run import StageFolder, difference
from halo.stop import stop_requests

KEPT = "checkpoints/figures.json"
"""In the stage's folder, until the stage is complete."""


class Measure:
    """Measures a figure, unless it is kept already. Called on every rank, with the same arguments."""

    def __init__(self, folder: StageFolder, bar: tqdm, asked_to_stop: Callable[[], bool]):
        self._folder, self._bar, self._asked_to_stop = folder, bar, asked_to_stop
        self._figures, seconds = on_rank0(lambda: _read(folder))
        self._began = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """That measuring took so far, in all starts of the stage."""
        return round(time.perf_counter() - self._began, 1)

    def __call__(self, name: str, samples: int, measure: Callable[..., float]) -> float:
        """
        Args:
            name: the figure's; no other of the stage has it.
            samples: by how many of the bar's samples a figure that is kept advances it.
            measure: returns the figure, the same on every rank; its `progress` is as halo/measuring/evaluation.py says.

        Raises:
            Stopped: a signal came to some rank (halo/stop.py). What is being measured is lost, what was is kept.
        """
        if name in self._figures:
            self._bar.update(samples)
        else:
            self._figures[name] = measure(progress=self._advance)
            kept = {"made_from": self._folder.made_from, "seconds": self.seconds, "figures": self._figures}
            on_rank0(lambda: _write(self._folder, kept))
        return self._figures[name]

    def _advance(self, samples: int) -> None:
        self._bar.update(samples)
        if all_sum(torch.tensor(int(self._asked_to_stop()))).item():
            raise Stopped(f"{self._folder.name}: stopped, with {len(self._figures)} figures measured and kept")


@contextmanager
def measuring(folder: StageFolder, samples: int | None, label: str) -> Iterator[Measure]:
    """Within, signals end what is being measured; one bar counts samples, to `samples` where that is known.

    Raises:
        UserError: the stage's folder has figures of other settings, or they cannot be read.
    """
    with stop_requests() as asked_to_stop, progress_bar(samples, label, unit="sample") as bar:
        yield Measure(folder, bar, asked_to_stop)


def _read(folder: StageFolder) -> tuple[dict[str, float], float]:
    """The figures that are kept, and the seconds that they took."""
    path = folder.path / KEPT
    if not path.is_file():
        return {}, 0.0
    try:
        kept = folder.load_json(KEPT)
        made_from, figures, seconds = kept["made_from"], dict(kept["figures"]), float(kept["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to measure anew") from error
    if made_from != folder.made_from:
        raise UserError(
            f"{path} was measured with another {difference(made_from, folder.made_from)}: remove it to measure "
            "anew, or choose another --run"
        )
    return figures, seconds


def _write(folder: StageFolder, kept: dict[str, Any]) -> None:
    try:
        folder.save_json(KEPT, kept)
    except OSError as error:
        raise UserError(f"{folder.path / KEPT} cannot be written: {error.strerror}") from error
