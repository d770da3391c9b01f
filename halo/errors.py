"""The exceptions that end a run in good order, and how the command line ends on one. Imports no torch.

What the system refuses (a full disk, a folder that is read-only) becomes a UserError in one place, `in_one_line`: work
of a single rank and whole commands run inside it (halo/distributed.py, halo/launch.py).
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_USER_ERROR = 2
"""The status of a process that a user's mistake ended."""
EXIT_INTERRUPTED = 130
"""The status of one that Ctrl-C ended, as shells have it."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line. Launchers print it alone, without a traceback."""


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """A signal asked the run to stop, and it has saved its state: where, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message: libraries' messages have many."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def in_one_line() -> Iterator[None]:
    """Inside, what the system refuses is raised as a UserError: which file, why, and what to do."""
    try:
        yield
    except Exception as error:
        refused = _of_system(error)
        if refused is None:
            raise
        where = f"{refused.filename}: " if refused.filename else ""
        raise UserError(f"{where}{refused.strerror}; mend that, and type the same command again") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, the system's errors name a file: `path`, if no other. That of a full disk does not say where."""
    try:
        yield
    except Exception as error:
        refused = _of_system(error)
        if refused is None or refused.filename:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


def _of_system(error: Exception) -> OSError | None:
    """What the system refused; None if `error` is something else. Libraries in Rust have it in their words."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, UserError) or number is None:
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For a command in one process: a UserError inside prints its line and ends the process with EXIT_USER_ERROR.

    So does what the system refuses. Ctrl-C ends it without a traceback.
    """
    try:
        with in_one_line():
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
