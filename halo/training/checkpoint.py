"""Checkpoints: all that a run needs to resume. A checkpoint's folder appears in one step, whole: `step-000000123`.

    checkpoints/latest             the name of the checkpoint to resume from
    checkpoints/step-000000123/
        engine/                    ZeRO's shards: weights and optimizer, without what is frozen
        random-00000.pt            a rank's random states
        state.json                 what it was made from, the number of ranks, and the training state
        manifest.json              every file's size and SHA-256

Saving has three parts. Training pauses for the first, `save`: each rank copies its state to host memory. Then a thread
of each rank writes its files (halo/training/background.py) while training continues. Last, between two later steps,
`publish`: rank 0 renames the folder, points `latest` to it, and removes the checkpoints that are no longer kept.

When a run resumes, the ranks first verify all files, each rank a share.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from halo.config import Training
from halo.distributed import barrier, device, on_every_rank, on_rank0, rank, world_size
from halo.errors import UserError, first_line
from halo.json_files import read_json
from halo.names import FileRecord, Files
from halo.run import atomic, difference, sha256
from halo.training.background import Writing
from halo.training.engine import CHECKPOINT_TYPES, Engine
from halo.training.pickles import foreign_types

ENGINE, STATE, FILE_LIST = "engine", "state.json", "manifest.json"
VERIFYING_THREADS = 4
"""On each rank: one thread reads and hashes about 1 GB/s."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """How far a run is: all that the next step depends on, beside the engine's state and the random states."""

    step: Annotated[int, Field(ge=0)] = 0
    """Steps done, including skipped ones."""
    seconds: float = 0.0
    loss: float = float("nan")
    """The loss of the last step that was not skipped."""
    skipped: int = 0
    """How many steps had a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0
    stream: dict[str, Annotated[int, Field(ge=0)]] = field(default_factory=dict)
    """The data stream's position."""

    def after_step(self, *, loss: float, skipped: bool, seconds: float, stream: dict[str, Any]) -> "TrainingState":
        """The state one step later."""
        return TrainingState(
            step=self.step + 1,
            seconds=seconds,
            loss=self.loss if skipped else loss,
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            stream=stream,
        )


@dataclass(frozen=True, kw_only=True)
class _State:
    """What state.json holds."""

    made_from: dict[str, Any]
    ranks: Annotated[int, Field(ge=1)]
    """How many wrote the checkpoint."""
    zero_stage: int
    progress: TrainingState


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint whose files are being written."""

    step: int
    partial: Path
    """Its folder until it is published."""
    state: _State
    writing: Writing


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The checkpoint that a run resumes from."""

    folder: Path
    files: Files
    ranks: int
    """How many wrote it."""
    state: TrainingState


class Checkpoints:
    """The checkpoints of one stage, under `folder`. Every rank must call `save`, `publish` and `resume`.

    Args:
        made_from: what the stage is made from. A checkpoint of anything else is refused.
        training: its settings say which checkpoints are kept.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], training: Training):
        self.folder = folder
        self.made_from = made_from
        self._keep_last = training.keep_last
        self._keep_every = training.keep_every
        self._pending: _Pending | None = None

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; if that was removed by hand, the newest one."""
        whole, pointer = self._whole(), self.folder / "latest"
        if pointer.is_file() and (named := self.folder / pointer.read_text(errors="replace").strip()) in whole:
            return named
        return whole[-1] if whole else None

    def save(self, engine: Engine, state: TrainingState) -> None:
        """Copy the state to host memory and begin to write it. It is a checkpoint after `publish`.

        Raises:
            UserError: nothing can be written there; on every rank.
        """
        assert self._pending is None, "the last one is not published yet"
        partial = self.folder / f"step-{state.step:09d}.partial"
        on_rank0(self._make_folder, state.step, partial)
        contents = engine.snapshot(partial / ENGINE)
        contents[partial / _random_file(rank())] = _random_states()
        self._pending = _Pending(
            step=state.step,
            partial=partial,
            state=_State(made_from=self.made_from, ranks=world_size(), zero_stage=engine.zero_stage, progress=state),
            writing=Writing(partial, contents),
        )

    def is_written(self) -> bool:
        """Whether this rank has written its part of the checkpoint that is not published yet, or has failed to."""
        return self._pending is not None and self._pending.writing.is_over()

    def publish(self) -> float | None:
        """Wait until every rank has written its part of what was saved, and make it the latest checkpoint.

        Returns:
            The seconds of writing, of the slowest rank; None: there was nothing to publish.

        Raises:
            UserError: a rank could not write its part; on every rank. Its files are removed, and `latest` is unchanged.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            parts = on_every_rank(self._written, pending)
            files = {name: listed for part, _ in parts for name, listed in part.items()}
            on_rank0(self._make_latest, pending, files)
        except UserError:
            if rank() == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise
        return max(seconds for _, seconds in parts)

    def resume(self, engine: Engine) -> TrainingState | None:
        """Load the latest checkpoint into `engine`; any number of ranks may have written it. None: there is none.

        Raises:
            UserError: it was made from something else or under another ZeRO stage, or it is damaged.
        """
        chosen = on_rank0(self._choose, engine.zero_stage)
        if chosen is None:
            return None
        checkpoint, files, ranks = chosen.folder, chosen.files, chosen.ranks
        mine = sorted(files, key=lambda name: files[name]["bytes"])[rank() :: world_size()]
        on_every_rank(self._verify, checkpoint, {name: files[name] for name in mine})
        if ranks == world_size():
            self._load(engine, checkpoint, checkpoint / ENGINE)
        else:
            self._load_converted(engine, checkpoint, ranks)
        # If there are more ranks than before, some get the same states: no random number must differ between ranks.
        _set_random_states(torch.load(checkpoint / _random_file(rank() % ranks), weights_only=True))
        return chosen.state

    def _make_folder(self, step: int, partial: Path) -> None:
        with self._writing(step):
            shutil.rmtree(partial, ignore_errors=True)
            (partial / ENGINE).mkdir(parents=True)

    def _written(self, pending: _Pending) -> tuple[Files, float]:
        with self._writing(pending.step):
            return pending.writing.wait()

    def _make_latest(self, pending: _Pending, files: Files) -> None:
        with self._writing(pending.step):
            files = {STATE: _write_json(pending.partial / STATE, asdict(pending.state))} | files
            _write_json(pending.partial / FILE_LIST, files)
            final = pending.partial.with_suffix("")
            shutil.rmtree(final, ignore_errors=True)  # the run may have resumed from an earlier checkpoint
            pending.partial.rename(final)
            with atomic(self.folder / "latest") as pointer:
                pointer.write_text(final.name + "\n")
            self._remove_all_but_kept(pending.step)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Turn an OSError inside into a UserError that says how the run resumes."""
        try:
            yield
        except OSError as error:
            latest = self.latest()
            then = f"resumes from {latest.name}" if latest else "starts the stage again"
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({error.strerror or error}): "
                f"mend that, and the same command {then}"
            ) from error

    def _whole(self) -> list[Path]:
        return sorted(self.folder.glob("step-*[0-9]"))

    def _remove_all_but_kept(self, newest: int) -> None:
        """Keep the newest and `keep_every`'s; later steps than the newest and half-written folders go too."""
        steps = [step for path in self._whole() if (step := int(path.name.removeprefix("step-"))) <= newest]
        kept = set(steps[-self._keep_last :]) | {s for s in steps if self._keep_every and s % self._keep_every == 0}
        names = {f"step-{step:09d}" for step in kept}
        for path in self.folder.glob("step-*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def _choose(self, zero_stage: int) -> _Chosen | None:
        checkpoint = self.latest()
        if checkpoint is None:
            return None
        onward = f"remove {checkpoint} to {self._onward(checkpoint)}"
        files: Files = read_json(checkpoint / FILE_LIST, Files, onward)
        if STATE not in files:
            raise self._damaged(checkpoint, f"{FILE_LIST} does not name {STATE}")
        self._verify(checkpoint, {STATE: files[STATE]})
        state: _State = read_json(checkpoint / STATE, _State, onward)
        for old, new in [
            (state.made_from, self.made_from),
            ({"ZeRO stage": state.zero_stage}, {"ZeRO stage": zero_stage}),
        ]:
            if old != new:
                raise UserError(
                    f"{checkpoint} was made with another {difference(old, new)}: resume with the same, "
                    f"or remove {self.folder} to start the stage again"
                )
        return _Chosen(folder=checkpoint, files=files, ranks=state.ranks, state=state.progress)

    def _verify(self, checkpoint: Path, files: Files) -> None:
        def verify(name: str) -> None:
            file, expected = checkpoint / name, files[name]
            try:
                if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                    raise self._damaged(checkpoint, f"{name} is not what was written")
            except OSError as error:
                raise self._damaged(checkpoint, f"{name}: {error.strerror}") from error
            if name.endswith(".pt"):
                self._refuse_code(checkpoint, name)

        with ThreadPoolExecutor(VERIFYING_THREADS) as threads:
            for _ in threads.map(verify, files):
                pass  # raises what one raised

    def _refuse_code(self, checkpoint: Path, name: str) -> None:
        """Verified files are as they were written, but not by whom."""
        try:
            foreign = foreign_types(checkpoint / name, CHECKPOINT_TYPES)
        except ValueError as error:
            raise self._damaged(checkpoint, f"{name} was not written by torch.save") from error
        if foreign:
            raise UserError(
                f"{checkpoint / name} is not loaded, because it names {foreign[0]}, which could run code: no "
                f"checkpoint of HALO does; remove {self.folder} to start the stage again"
            )

    def _damaged(self, checkpoint: Path, what: str) -> UserError:
        return UserError(f"{checkpoint} is damaged ({what}): remove it to {self._onward(checkpoint)}")

    def _onward(self, checkpoint: Path) -> str:
        """What happens without this checkpoint."""
        earlier = [path.name for path in self._whole() if path.name < checkpoint.name]
        return f"resume from {earlier[-1]}" if earlier else "start the stage again"

    def _load(self, engine: Engine, checkpoint: Path, folder: Path, *, converted: bool = False) -> None:
        try:
            engine.load(folder, converted=converted)
        except Exception as error:  # the files are verified: too little memory, say, or another version of DeepSpeed
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"{checkpoint} cannot be loaded, though its files are as they were written ({reason})"
            ) from error

    def _load_converted(self, engine: Engine, checkpoint: Path, ranks: int) -> None:
        """Load what another number of ranks wrote: from a conversion beside the checkpoint, which is removed then."""
        converted = checkpoint.with_suffix(".converted")
        on_rank0(self._convert, engine, checkpoint, converted, ranks)
        self._load(engine, checkpoint, converted / ENGINE, converted=True)
        barrier()
        on_rank0(shutil.rmtree, converted)

    def _convert(self, engine: Engine, checkpoint: Path, converted: Path, ranks: int) -> None:
        print(f"{checkpoint}: saved on {ranks} rank(s), converting it for {world_size()}", flush=True)
        shutil.rmtree(converted, ignore_errors=True)
        try:
            engine.convert(checkpoint / ENGINE, converted / ENGINE)
        except OSError as error:
            shutil.rmtree(converted, ignore_errors=True)
            raise UserError(
                f"{checkpoint} cannot be converted for {world_size()} ranks ({error}): resume on {ranks}"
            ) from error


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _random_states() -> dict[str, torch.Tensor]:
    """The states of torch's generators. Training does not use NumPy's and Python's global ones."""
    states = {"cpu": torch.get_rng_state()}
    if device().type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device().type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])


def _write_json(path: Path, value: Any) -> FileRecord:
    """To the disk. Returns the file's {"bytes", "sha256"}."""
    content = json.dumps(value, indent=2).encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
