"""Resumable training state. A checkpoint is a folder that appears in one step: `step-000123`, never half of it.

Everything the next step depends on goes in: ZeRO's shards, the optimizer, the step, the data stream's position and
the random states. The newest is kept; the one before it goes once the newest is whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from halo.distributed import barrier, on_rank0
from halo.engine import Engine


class Checkpoints:
    """The checkpoints of one stage, under `folder`. Every rank calls every method."""

    def __init__(self, folder: Path):
        self.folder = folder

    def latest(self) -> Path | None:
        whole = sorted(self.folder.glob("step-*[0-9]"))
        return whole[-1] if whole else None

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:09d}"
        partial = final.with_suffix(".partial")
        on_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))
        engine.save(partial, {**state, "torch_rng": torch.get_rng_state()})
        barrier()
        on_rank0(lambda: self._publish(partial, final))

    def resume(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint into `engine`; None when there is none."""
        latest = on_rank0(self.latest)
        if latest is None:
            return None
        state = engine.load(latest)
        torch.set_rng_state(state["torch_rng"])
        return state

    def _publish(self, partial: Path, final: Path) -> None:
        for root, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(final)
        for other in self.folder.iterdir():
            if other != final:
                shutil.rmtree(other)
