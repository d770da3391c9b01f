"""Resumable training state. A checkpoint is a folder that appears in one step: `step-000000123`, never half of it.

    checkpoints/latest             the name of the checkpoint to go on from
    checkpoints/step-000000123/
        engine/                    ZeRO's shards: weights and optimizer, and nothing that is frozen
        random-00000.pt            a rank's random states
        state.json                 what it was made from, by how many ranks, and the run's progress
        manifest.json              every file's size and SHA-256

Saving has three parts. Training stands still for the first, `save`: each rank copies its state to host memory. A
thread of each rank then writes its files (halo/training/background.py) while training goes on. Last, between two later
steps, `publish`: rank 0 renames the folder, points `latest` to it, and removes what is no longer kept.

Going on, the ranks verify all files first, each a share.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from halo.config import Training
from halo.distributed import barrier, device, on_every_rank, on_rank0, rank, world_size
from halo.errors import UserError
from halo.run import atomic, difference, sha256
from halo.training.background import Files, Writing
from halo.training.engine import Engine

ENGINE, STATE, MANIFEST = "engine", "state.json", "manifest.json"
VERIFYING_THREADS = 4
"""Of each rank: one reads and hashes about 1 GB/s."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: what the next step depends on beside the engine's state and the random states."""

    step: int = 0
    """Steps done, skipped ones among them."""
    seconds: float = 0.0
    loss: float = float("nan")
    """Of the last step that was not skipped."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    """Where the data stream stands."""

    def after(self, *, loss: float, skipped: bool, seconds: float, stream: dict[str, Any]) -> "Progress":
        """One step further."""
        return Progress(
            step=self.step + 1,
            seconds=seconds,
            loss=self.loss if skipped else loss,
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            stream=stream,
        )


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    state: dict[str, Any]
    writing: Writing


class Checkpoints:
    """The checkpoints of one stage, under `folder`. Every rank calls `save`, `publish` and `resume`.

    Args:
        made_from: what the stage is made from. A checkpoint of anything else is refused.
        training: which checkpoints are kept.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], training: Training):
        self.folder = folder
        self.made_from = made_from
        self._keep_last = training.keep_last
        self._keep_every = training.keep_every
        self._pending: _Pending | None = None

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; where that one was removed by hand, the newest there is."""
        whole, pointer = self._whole(), self.folder / "latest"
        if pointer.is_file() and (named := self.folder / pointer.read_text(errors="replace").strip()) in whole:
            return named
        return whole[-1] if whole else None

    def save(self, engine: Engine, progress: Progress) -> None:
        """Copy the state to host memory and begin to write it. It is a checkpoint once it is published.

        Raises:
            UserError: nothing can be written there; on every rank.
        """
        assert self._pending is None, "one is being written: publish it first"
        partial = self.folder / f"step-{progress.step:09d}.partial"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / ENGINE).mkdir(parents=True)

        on_rank0(lambda: self._file_errors(progress.step, begin))
        contents = engine.snapshot(partial / ENGINE)
        contents[partial / _random_file(rank())] = _random_states()
        state = {"made_from": self.made_from, "ranks": world_size(), "zero_stage": engine.zero_stage}
        self._pending = _Pending(
            step=progress.step,
            partial=partial,
            state=state | {"progress": asdict(progress)},
            writing=Writing(partial, contents),
        )

    def is_written(self) -> bool:
        """Whether this rank's part of what was last saved is written, or cannot be, and not published yet."""
        return self._pending is not None and self._pending.writing.is_over()

    def publish(self) -> float | None:
        """Wait until what was saved is written on every rank, and make it the latest checkpoint.

        Returns:
            The seconds for which the slowest rank wrote; None: there was nothing to publish.

        Raises:
            UserError: a rank could not write its part; on every rank. Nothing is left of it, and `latest` stands.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            parts = on_every_rank(lambda: self._file_errors(pending.step, pending.writing.wait))
            files = {name: listed for part, _ in parts for name, listed in part.items()}
            on_rank0(lambda: self._file_errors(pending.step, lambda: self._make_latest(pending, files)))
        except UserError:
            if rank() == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise
        return max(seconds for _, seconds in parts)

    def resume(self, engine: Engine) -> Progress | None:
        """Load the latest checkpoint into `engine`, whatever number of ranks wrote it; None when there is none.

        Raises:
            UserError: it was made from something else or under another ZeRO stage, or it is damaged.
        """
        chosen = on_rank0(lambda: self._choose(engine))
        if chosen is None:
            return None
        checkpoint, files, ranks, progress = chosen
        mine = sorted(files, key=lambda name: files[name]["bytes"])[rank() :: world_size()]
        on_every_rank(lambda: self._verify(checkpoint, {name: files[name] for name in mine}))
        if ranks == world_size():
            self._load(engine, checkpoint, checkpoint / ENGINE)
        else:
            self._load_converted(engine, checkpoint, ranks)
        # More ranks than before share the states there are: nothing random tells ranks apart.
        _set_random_states(torch.load(checkpoint / _random_file(rank() % ranks), weights_only=True))
        return progress

    def _make_latest(self, pending: _Pending, files: Files) -> None:
        files = {STATE: _write_json(pending.partial / STATE, pending.state)} | files
        _write_json(pending.partial / MANIFEST, files)
        final = pending.partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # of a run that went on from an earlier one
        pending.partial.rename(final)
        with atomic(self.folder / "latest") as pointer:
            pointer.write_text(final.name + "\n")
        self._remove_all_but_kept(pending.step)

    def _whole(self) -> list[Path]:
        return sorted(self.folder.glob("step-*[0-9]"))

    def _remove_all_but_kept(self, newest: int) -> None:
        """Also what was given up (later steps than the newest), and what a killed run left half-written."""
        steps = [step for path in self._whole() if (step := int(path.name.removeprefix("step-"))) <= newest]
        kept = set(steps[-self._keep_last :]) | {s for s in steps if self._keep_every and s % self._keep_every == 0}
        names = {f"step-{step:09d}" for step in kept}
        for path in self.folder.glob("step-*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def _file_errors(self, step: int, function: Callable[[], T]) -> T:
        """Run `function`, whose OSError becomes a UserError."""
        try:
            return function()
        except OSError as error:
            latest = self.latest()
            onward = f"goes on from {latest.name}" if latest else "starts the stage again"
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({error.strerror or error}): "
                f"mend that, and the same command {onward}"
            ) from error

    def _choose(self, engine: Engine) -> tuple[Path, Files, int, Progress] | None:
        checkpoint = self.latest()
        if checkpoint is None:
            return None
        try:
            files: Files = json.loads((checkpoint / MANIFEST).read_text())
            self._verify(checkpoint, {STATE: files[STATE]})
            state = json.loads((checkpoint / STATE).read_text())
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(checkpoint, f"{MANIFEST} cannot be read") from error
        for old, new in [
            (state["made_from"], self.made_from),
            ({"ZeRO stage": state["zero_stage"]}, {"ZeRO stage": engine.zero_stage}),
        ]:
            if old != new:
                raise UserError(
                    f"{checkpoint} was made with another {difference(old, new)}: go on with the same, "
                    f"or remove {self.folder} to start the stage again"
                )
        return checkpoint, files, state["ranks"], Progress(**state["progress"])

    def _verify(self, checkpoint: Path, files: Files) -> None:
        def verify(name: str) -> None:
            file, expected = checkpoint / name, files[name]
            try:
                if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                    raise self._damaged(checkpoint, f"{name} is not what was written")
            except OSError as error:
                raise self._damaged(checkpoint, f"{name}: {error.strerror}") from error

        with ThreadPoolExecutor(VERIFYING_THREADS) as threads:
            for _ in threads.map(verify, files):
                pass  # raises what one raised

    def _damaged(self, checkpoint: Path, what: str) -> UserError:
        earlier = [path.name for path in self._whole() if path.name < checkpoint.name]
        onward = f"go on from {earlier[-1]}" if earlier else "start the stage again"
        return UserError(f"{checkpoint} is damaged ({what}): remove it to {onward}")

    def _load(self, engine: Engine, checkpoint: Path, folder: Path, *, converted: bool = False) -> None:
        try:
            engine.load(folder, converted=converted)
        except Exception as error:  # no damage: the files were verified; memory, say, or another version of DeepSpeed
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UserError(
                f"{checkpoint} cannot be loaded, though its files are as they were written ({reason})"
            ) from error

    def _load_converted(self, engine: Engine, checkpoint: Path, ranks: int) -> None:
        """Through a form that any number of ranks can read, in a folder beside the checkpoint, removed afterwards."""
        beside = checkpoint.with_suffix(".converted")

        def convert() -> None:
            print(f"{checkpoint}: saved on {ranks} rank(s), converting it for {world_size()}", flush=True)
            shutil.rmtree(beside, ignore_errors=True)
            try:
                engine.convert(checkpoint / ENGINE, beside / ENGINE)
            except OSError as error:
                shutil.rmtree(beside, ignore_errors=True)
                raise UserError(
                    f"{checkpoint} cannot be converted for {world_size()} ranks ({error}): go on with {ranks}"
                ) from error

        on_rank0(convert)
        self._load(engine, checkpoint, beside / ENGINE, converted=True)
        barrier()
        on_rank0(lambda: shutil.rmtree(beside))


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _random_states() -> dict[str, torch.Tensor]:
    """Of torch's generators. NumPy's and Python's global ones serve nothing in training."""
    states = {"cpu": torch.get_rng_state()}
    if device().type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device().type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    """To the disk. Returns the file's {"bytes", "sha256"}."""
    content = json.dumps(value, indent=2).encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
