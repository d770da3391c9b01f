"""Resumable training state. A checkpoint is a folder that appears in one step: `step-000123`, never half of it.

Everything the next step depends on goes in: ZeRO's shards, the optimizer, the step, the data stream's position and
the random states. The newest is kept; the one before it goes once the newest is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from halo.distributed import barrier, on_rank0
from halo.engine import Engine
from halo.errors import UserError
from halo.run import difference

MADE_FROM = "made_from.json"


class Checkpoints:
    """The checkpoints of one stage, under `folder`. Every rank calls every method.

    Args:
        made_from: what the stage is made from. A checkpoint of anything else is refused.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        self.folder = folder
        self.made_from = made_from

    def latest(self) -> Path | None:
        whole = sorted(self.folder.glob("step-*[0-9]"))
        return whole[-1] if whole else None

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:09d}"
        partial = final.with_suffix(".partial")
        on_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))
        engine.save(partial, {**state, "torch_rng": torch.get_rng_state()})
        barrier()
        on_rank0(lambda: self._publish(engine, partial, final))

    def resume(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint into `engine`; None when there is none.

        Raises:
            UserError: it was made from something else or by other ranks, or it is damaged.
        """
        latest = on_rank0(lambda: self._checked(engine))
        if latest is None:
            return None
        state = engine.load(latest)
        torch.set_rng_state(state["torch_rng"])
        return state

    def _checked(self, engine: Engine) -> Path | None:
        latest = self.latest()
        if latest is None:
            return None
        try:
            saved = json.loads((latest / MADE_FROM).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{latest} is damaged: remove {self.folder} to start the stage again") from error
        for what, old, new in [
            ("settings", saved["made_from"], self.made_from),
            ("partition", saved["partition"], engine.partition()),
        ]:
            if old != new:
                raise UserError(
                    f"{latest} was made with another {what}, {difference(old, new)}: go on with the same, "
                    f"or remove {self.folder} to start the stage again"
                )
        return latest

    def _publish(self, engine: Engine, partial: Path, final: Path) -> None:
        record = {"made_from": self.made_from, "partition": engine.partition()}
        (partial / MADE_FROM).write_text(json.dumps(record, indent=2) + "\n")
        for root, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(root, name), "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(final)
        for other in self.folder.iterdir():
            if other != final:
                shutil.rmtree(other)
