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


@contextmanager
def sole_task(folder: Path, task: int, tasks: int) -> Iterator[None]:
    """Be the one process that works on a folder as `task` of `tasks`, where nobody divides the work otherwise.

    Raises:
        UserError: another process is this task, or divides the work in another number of tasks.
    """
    mine = folder / f"tasks-of-{tasks}.lock"
    with open(mine, "a+b") as file:
        if not _try_lock(file, task, 1):
            raise UserError(_held(folder, f"task-{task}-of-{tasks}.json"))
        about = folder / f"task-{task}-of-{tasks}.json"
        about.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "job": _job()}))
        for other in folder.glob("tasks-of-*.lock"):
            if other != mine:
                with open(other, "a+b") as foreign:
                    if not _try_lock(foreign, 0, 0):
                        raise UserError(_held(folder, f"task-*-of-{other.stem.removeprefix('tasks-of-')}.json"))
        yield


def _try_lock(file: IO[bytes], begin: int, length: int) -> bool:
    """Lock bytes of a file (0: all that follow), unless another process holds one. Forking passes nothing on."""
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


def _held(folder: Path, pattern: str) -> str:
    """Who holds a lock, in words, as far as it said so."""
    for path in sorted(folder.glob(pattern)):
        about = json.loads(path.read_text())
        job = f"job {about['job']}, " if about["job"] else ""
        who = f" ({job}process {about['pid']} on {about['host']})"
        break
    else:
        who = ""
    return f"another process works on {folder.parent}{who}: wait for its end, or end it"


def _job() -> str | None:
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
