"""File locks that the kernel releases when their holder ends, even if it is killed: there are no stale locks.

All kinds hold across nodes on NFS, and on Lustre where it is mounted with flock.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from halo.errors import UserError, naming
from halo.run import RUN_LOCK


class NoLocksError(UserError):
    """The file system has no locks."""


@contextmanager
def exclusive(path: Path) -> Iterator[IO[bytes]]:
    """Wait for the lock of a file, and hold it within the block. Yields the file, open to read and append."""
    with open(path, "a+b") as file:
        with _refusals(file):
            fcntl.flock(file, fcntl.LOCK_EX)  # excludes other threads of this process too
        file.seek(0)
        yield file


class RunLock:
    """The right to work on a run's folder. One process has it; while it has, the lock's file says which.

    Where a file system has no locks, a line says that nothing keeps others out.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / RUN_LOCK
        self._file: IO[bytes] | None = None

    def take(self) -> None:
        """Raises:
        UserError: another process has it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = open(self._path, "a+b")  # noqa: SIM115, it stays open
            try:
                free = try_lock(file, 0, 0)
            except NoLocksError as error:
                print(f"{error}; until then, start no second command on {self._folder}", flush=True)
                free = True
            if not free:
                file.seek(0)
                said = file.read()
                file.close()
                raise UserError(f"another process works on {self._folder}{_who(said)}: wait until it ends, or stop it")
            if _is_at(self._path, file):
                self._file = file
            else:  # its holder has just released it
                file.close()
        with naming(self._path):
            self._file.truncate(0)
            self._file.write(json.dumps(_about_me()).encode())
            self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # while it is locked: who opens it now sees that it is gone
            self._file.close()
            self._file = None


class TaskLock:
    """The right to work on a folder as `task` of `tasks`. One process has it.

    Create it, and call `is_alone`, while holding the folder's `exclusive` lock.

    Raises:
        UserError: another process is this task, or works on the folder with another number of tasks.
    """

    def __init__(self, folder: Path, task: int, tasks: int):
        self._folder = folder
        mine = folder / f"tasks-of-{tasks}.lock"
        self._file = open(mine, "a+b")  # noqa: SIM115, it stays open
        if not try_lock(self._file, task, 1):
            raise self._held(f"task-{task}-of-{tasks}.json")
        for path in folder.glob("tasks-of-*.lock"):
            if path != mine:
                with open(path, "a+b") as other:
                    if not try_lock(other, 0, 0):
                        raise self._held(f"task-*-of-{path.stem.removeprefix('tasks-of-')}.json")
        (folder / f"task-{task}-of-{tasks}.json").write_text(json.dumps(_about_me()))

    def is_alone(self) -> bool:
        """Whether no other task is at work. If so, no other can begin until `release`."""
        return try_lock(self._file, 0, 0)

    def release(self) -> None:
        self._file.close()

    def _held(self, pattern: str) -> UserError:
        """Another process holds the lock: which one, if it wrote so."""
        self.release()
        who = ""
        for path in sorted(self._folder.glob(pattern)):
            who = _who(path.read_bytes())
        return UserError(f"another process works on {self._folder.parent}{who}: wait until it ends, or stop it")


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _about_me() -> dict[str, Any]:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return {"host": os.uname().nodename, "pid": os.getpid(), "job": job}


def _who(written: bytes) -> str:
    """What a process wrote with `_about_me`, as words of a sentence; empty if it was not whole yet."""
    try:
        about = json.loads(written)
        job = f"job {about['job']}, " if about["job"] else ""
        return f" ({job}process {about['pid']} on {about['host']})"
    except (ValueError, TypeError, KeyError):
        return ""


def try_lock(file: IO[bytes], begin: int, length: int) -> bool:
    """Lock `length` bytes of a file (0: all from `begin` on). False: another process has locked some of them."""
    with _refusals(file):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, begin)
        except (BlockingIOError, PermissionError):
            return False
        return True


@contextmanager
def _refusals(file: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoLocksError(
            f"{file.name}: no file locks here ({error.strerror}); use a file system that has them"
        ) from error
