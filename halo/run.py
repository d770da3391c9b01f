"""A run is a folder; a stage is a folder in it, complete when its stage.json is there.

    runs/<name>/config.toml            the resolved configuration, which later commands start from
    runs/<name>/<stage>/stage.json     written last: what the stage was made from, what it wrote, what it cost

stage.json names every file that the stage hands on, with size and SHA-256. A stage without it was interrupted. A stage
whose record no longer fits (another teacher, other settings, an altered file) is refused, never overwritten.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from halo.config import Config
from halo.distributed import on_rank0, rank
from halo.errors import UserError, naming
from halo.graph import RUN_CONFIG, STAGE_RECORD
from halo.json_files import read_json
from halo.names import Files
from halo.tables import config_table, read_toml, to_toml

IDENTITY = ("name", "teacher")
"""The settings that no run changes: a folder with others belongs to another run. For all others, a finished stage
decides: it refuses those that it sees (halo/graph.py)."""
JOBS = "slurm"
"""The subfolder in which slurm/common.sh keeps its jobs' logs. It may be there before the run's first stage."""
_PIECE = 1 << 28
"""Bytes of a file that one core hashes."""
RUN_LOCK = ".lock"
"""In a run's folder while a command works on it (halo/data/locks.py)."""
MAY_BE_THERE = (JOBS, RUN_LOCK, f"{RUN_CONFIG}.partial")
"""What a folder may hold and yet be free: a command that was killed at its start leaves the last two."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `path` in one step, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`, on failure it is removed."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What stage.json holds."""

    made_from: dict[str, Any]
    """The teacher's fingerprint, the settings that the stage sees, and the digests of its inputs."""
    files: Files
    summary: dict[str, Any]
    """Tokens, trained parameters, seconds, and the stage's own results."""
    taken_from: str | None = None
    """The folder of the run that did the work, if it was another."""


class StageFolder:
    """A stage's folder: write the outputs, then `complete` it.

    Args:
        path: its last part is the stage's name.
        made_from: as `Record` has it, for a stage that this run would make now.
    """

    def __init__(self, path: Path, made_from: dict[str, Any]):
        self.path = path
        self.made_from = made_from

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record_path(self) -> Path:
        return self.path / STAGE_RECORD

    def is_complete(self) -> bool:
        """Whether the stage is finished, and is what this run would make now. Reads all its files.

        Raises:
            UserError: it is finished, but was made from something else, or its files are not what it recorded.
        """
        if not self.record_path.is_file():
            return False
        if other := self.mismatch():
            raise UserError(
                f"{self.path} was made from another {other}: remove that folder to make it again, or choose another "
                "--run, with --from for the stages that stay the same"
            )
        if damage := self.damage():
            raise UserError(f"{damage}: remove {self.path} to make it again")
        return True

    def mismatch(self) -> str:
        """How what a finished stage was made from differs from what this run would make it from.

        In the words of `difference`; empty where it does not.
        """
        record = self.record()
        return difference(record.made_from, self.made_from) if record.made_from != self.made_from else ""

    def damage(self) -> str:
        """Which file of a finished stage is not what it recorded, in words; empty where all are."""
        for name, expected in self.record().files.items():
            file = self.path / name
            if not file.is_file():
                return f"{file} is missing although its stage was complete"
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{file} is damaged (not what its stage wrote)"
        return ""

    def record(self) -> Record:
        """Raises:
        UserError: stage.json cannot be read.
        """
        return read_json(self.record_path, Record, f"remove {self.path} to make it again")

    def digest(self) -> str:
        """SHA-256 of what a finished stage was made from and hands on. The cost and a taking do not change it."""
        record = self.record()
        stands_for = {"made_from": record.made_from, "files": record.files}
        return hashlib.sha256(json.dumps(stands_for, sort_keys=True).encode()).hexdigest()

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        with atomic(self.path / name) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / name)

    def save_bytes(self, name: str, content: bytes) -> None:
        with atomic(self.path / name) as partial:
            partial.write_bytes(content)

    def save_json(self, name: str, value: Any) -> None:
        self.save_bytes(name, (json.dumps(value, indent=2) + "\n").encode())

    def load_json(self, name: str, kind: Any) -> Any:
        """Raises:
        UserError: as `read_json`.
        """
        return read_json(self.path / name, kind, f"remove {self.path} to make it again")

    def files_in(self, name: str) -> list[str]:
        """The files of a subfolder, also those in folders of it, for `complete`."""
        files = (path for path in (self.path / name).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    def complete(self, files: list[str], summary: dict[str, Any]) -> None:
        """Finish the stage: record the files that it hands on. The last thing a stage does, on rank 0.

        Its checkpoints are removed: a finished stage keeps its weights, not its optimizer.
        """
        listed = {
            name: {"bytes": (self.path / name).stat().st_size, "sha256": sha256(self.path / name)} for name in files
        }
        self.save_json(STAGE_RECORD, {"made_from": self.made_from, "files": listed, "summary": summary})
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        """Of a finished stage. A kill may come before `complete` has done so: then the next command does."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def take(self, source: "StageFolder") -> None:
        """Make this stage the finished one in another run's folder: its files are linked, or else copied.

        Raises:
            UserError: a copy is not what was copied.
            OSError: the disk refuses.
        """
        record = source.record()
        with atomic_folder(self.path) as partial:
            for name, expected in record.files.items():
                _link_or_copy(source.path / name, partial / name, expected["sha256"])
            origin = str(source.path.parent.resolve())
            taken = {"made_from": record.made_from, "files": record.files, "summary": record.summary}
            (partial / STAGE_RECORD).write_text(json.dumps(taken | {"taken_from": origin}, indent=2) + "\n")


def _link_or_copy(source: Path, target: Path, digest: str) -> None:
    """A link is safe: no stage writes into a finished file, each replaces it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        if sha256(target) != digest:
            raise UserError(f"{source} was damaged while it was copied: try again") from None


def claim(folder: Path, config: Config) -> None:
    """Check that a run's folder is this run's, or is free. Writes nothing.

    Raises:
        UserError: the folder belongs to another run, holds files but no run, or cannot be a folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder: choose another --run")
    path = folder / RUN_CONFIG
    if path.is_file():
        recorded, table = read_toml(path), config_table(config)
        for key in IDENTITY:
            if recorded.get(key) != table[key]:
                other = difference({key: recorded.get(key)}, {key: table[key]})
                raise UserError(f"{folder} belongs to another run, with another {other}: choose another --run")
    elif folder.exists() and any(path.name not in MAY_BE_THERE for path in folder.iterdir()):
        raise UserError(f"{folder} holds files but no run (no config.toml): choose another --run")


@contextmanager
def recorded_config(folder: Path, config: Config) -> Iterator[None]:
    """Write the run's config.toml, on rank 0; later commands start from it.

    A UserError inside restores the old one. Where there was none, and nothing else was written, the new one goes.
    """
    path = folder / RUN_CONFIG
    before = path.read_bytes() if path.is_file() else None
    on_rank0(_write_config, path, to_toml(config_table(config)))
    try:
        yield
    except UserError:
        if rank() == 0:
            if before is not None:
                with atomic(path) as partial:
                    partial.write_bytes(before)
            elif all(other.name in (RUN_CONFIG, *MAY_BE_THERE) for other in folder.iterdir()):
                path.unlink()
        raise


def _write_config(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():  # a finished run may be read-only
        with atomic(path) as partial:
            partial.write_text(text)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing that differs, in words: "teacher", or "lr (0.001, now 0.002)"."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if a != b:
            if isinstance(a, dict) and isinstance(b, dict):
                return difference(a, b)
            long = any(isinstance(v, str) and len(v) == 64 for v in (a, b))
            return key if long else f"{key} ({a!r}, now {b!r})"
    return "version"


def content_digest(files: Mapping[str, Path], beside: str = "") -> str:
    """A digest of files: of their names, which are the keys, and of all that is in them.

    Cores share the work: it takes seconds for the weights of a large model.

    Args:
        beside: something else that belongs to it.
    """
    pieces = []
    for name, path in sorted(files.items()):
        about = path.stat()
        for begin in range(0, max(about.st_size, 1), _PIECE):
            pieces.append((name, path, begin, about.st_size, about.st_mtime_ns))
    digest = hashlib.sha256(beside.encode())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for (name, _, begin, *_), found in zip(pieces, threads.map(_piece_digest, pieces), strict=True):
            digest.update(f"{name} {begin} {found}\n".encode())
    return digest.hexdigest()


@cache  # a command asks several times
def _piece_digest(piece: tuple[str, Path, int, int, int]) -> str:
    _, path, begin, *_ = piece
    digest, left = hashlib.sha256(), _PIECE
    with open(path, "rb") as file:
        file.seek(begin)
        while left and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()
