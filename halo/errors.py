"""The exceptions that end a run in good order, and how the command line ends on one. Imports no torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
"""The status of a process that a user's mistake ended."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line. Launchers print it alone, without a traceback."""


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """A signal asked the run to stop, and it has saved its state: where, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message: libraries' messages have many."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For a command in one process: a UserError inside prints its line and ends the process with EXIT_USER_ERROR."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
