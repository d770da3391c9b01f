"""What one watches: a progress bar on rank 0, TensorBoard, and a line a step in metrics.jsonl."""

import json
import resource
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from halo.distributed import all_sum, rank, world_size


def progress_bar(total: int, name: str, unit: str = "step", initial: int = 0) -> tqdm:
    """The one bar of a stage; silent on every rank but 0."""
    return tqdm(
        total=total, desc=f"{name:>8}", unit=unit, initial=initial, disable=rank() != 0, smoothing=0.1, mininterval=0.5
    )


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over all ranks, in one collective."""
    names = sorted(values)
    total = all_sum(torch.stack([values[name].detach().double().mean() for name in names]))
    return dict(zip(names, (total / world_size()).tolist(), strict=True))


def peak_memory_gib() -> float:
    """This process's peak: of the GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """A training stage's record. Every rank may call it; rank 0 writes.

    Args:
        folder: the stage's folder; TensorBoard's files go into `tensorboard/` in it.
        name: the bar's title.
        steps: the stage's length.
        step: where it starts, after a resume; what was recorded from there on is dropped.
    """

    def __init__(self, folder: Path, *, name: str, steps: int, step: int = 0):
        self._bar = progress_bar(steps, name, initial=step)
        self._clock = time.perf_counter()
        self._writer, self._lines = None, None
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
            path = folder / "metrics.jsonl"
            before = path.read_text().splitlines(keepends=True)[:step] if path.is_file() else []
            self._lines = open(path, "w", buffering=1)  # noqa: SIM115, closed in close()
            self._lines.writelines(before)

    def log(self, step: int, values: dict[str, float], *, tokens: int) -> None:
        """Record the step that just ended. `tokens` are its own, over all ranks."""
        now = time.perf_counter()
        values = values | {"tokens_per_s": tokens / (now - self._clock), "peak_gib": peak_memory_gib()}
        self._clock = now
        self._bar.update()
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", tokens_s=f"{values['tokens_per_s']:,.0f}", refresh=False)
        if self._writer is not None and self._lines is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._lines.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None and self._lines is not None:
            self._writer.close()
            self._lines.close()
