"""File locks that the kernel lets go of when their holder ends, however it ends: nothing stale is left to clear up.

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
    """Wait for the lock of a file, and hold it. Yields the file, open to read and append."""
    with open(path, "a+b") as file:
        with _refusals(file):
            fcntl.flock(file, fcntl.LOCK_EX)  # each opening for itself, also within a process
        file.seek(0)
        yield file


class Place:
    """Being the one process that works on a folder as `task` of `tasks`, where nobody divides the work otherwise.

    Take and leave it, and ask `is_alone`, under one `exclusive` lock.

    Raises:
        UserError: another process is this task, or divides the work in another number of tasks.
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
        """Whether no other task is at work. Nobody else has a place from then on."""
        return try_lock(self._file, 0, 0)

    def leave(self) -> None:
        self._file.close()

    def _held(self, pattern: str) -> UserError:
        """Who holds a place, in words, as far as it said so."""
        self.leave()
        who = ""
        for path in sorted(self._folder.glob(pattern)):
            about = json.loads(path.read_text())
            job = f"job {about['job']}, " if about["job"] else ""
            who = f" ({job}process {about['pid']} on {about['host']})"
        return UserError(f"another process works on {self._folder.parent}{who}: wait for its end, or end it")


def try_lock(file: IO[bytes], begin: int, length: int) -> bool:
    """Lock bytes of a file (0: all that follow), unless another process holds one. For this process alone."""
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
