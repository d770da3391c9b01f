"""The exceptions that end a run in good order."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line. Launchers print it alone, without a traceback."""


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """A signal asked the run to stop, and it has saved its state: where, in one line."""
