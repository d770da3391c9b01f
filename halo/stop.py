"""What asks a run to stop: a training stage then finishes its step, saves and ends, and so do measuring stages.

    SIGTERM, SIGUSR1, SIGINT (Ctrl-C)    a second SIGINT ends the process at once
    the end of its launcher              killed alone, it would leave ranks that nobody can see

It is enough if one rank notices: the ranks tell each other in a collective that each step has anyway. In all other work
there is nothing to save, and the signals end the process as usual.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halo.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 1.0
"""Seconds. SIGINTs this close are one: a terminal sends it to all processes, and torchrun passes its own on."""
DEEPSPEED = b"deepspeed.launcher.launch"
"""In the command of the process that `deepspeed` starts on each node, and which starts the ranks."""

_watched: list[tuple[int, int]] = []
"""Processes, and the parents that they had at the start."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the signals end nothing. Yields a function that says whether this rank is asked to stop."""
    came: list[tuple[int, float]] = []

    def note(number: int, _: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and any(n == number and now - when > SAME for n, when in came):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        came.append((number, now))

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(came) or _launcher_is_gone()
    except Stopped:
        raise  # the run is ending: another signal must not interrupt that
    except BaseException:
        _restore(before)
        raise
    _restore(before)
    if came:  # after the last step has asked: all is saved, and the signal ends the work that follows
        signal.raise_signal(came[-1][0])


@contextmanager
def ignoring_stop_requests() -> Iterator[None]:
    """Inside, the signals do nothing: for a rank that ends when others do."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        _restore(before)


def watch_launcher() -> None:
    """Have this process, which a launcher started, notice the launcher's end. DeepSpeed's consists of two processes."""
    parent = os.getppid()
    _watched[:] = [(os.getpid(), parent)]
    command = Path(f"/proc/{parent}/cmdline")
    if command.is_file() and DEEPSPEED in command.read_bytes():
        _watched.append((parent, _parent_of(parent)))


def _launcher_is_gone() -> bool:
    return any(_parent_of(process) != parent for process, parent in _watched)


def _parent_of(process: int) -> int:
    """0: there is no such process."""
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
