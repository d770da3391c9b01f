"""File locks that the kernel releases when their holder ends, even if it is killed: there are no stale locks.

Both kinds hold across nodes on NFS, and on Lustre where it is mounted with flock.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from halo.errors import UserError


@contextmanager
def exclusive(path: Path) -> Iterator[IO[bytes]]:
    """Wait for the lock of a file, and hold it within the block. Yields the file, open to read and append."""
    with open(path, "a+b") as file:
        with _refusals(file):
            fcntl.flock(file, fcntl.LOCK_EX)  # excludes other threads of this process too
        file.seek(0)
        yield file


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
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
        about = {"host": os.uname().nodename, "pid": os.getpid(), "job": job}
        (folder / f"task-{task}-of-{tasks}.json").write_text(json.dumps(about))

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
            about = json.loads(path.read_text())
            job = f"job {about['job']}, " if about["job"] else ""
            who = f" ({job}process {about['pid']} on {about['host']})"
        return UserError(f"another process works on {self._folder.parent}{who}: wait until it ends, or stop it")


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
        raise UserError(
            f"{file.name}: no file locks here ({error.strerror}); use a file system that has them"
        ) from error
