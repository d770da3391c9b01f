"""SIGTERM and SIGUSR1 ask a run to stop: a training stage finishes its step, saves and ends; so do measuring stages.

It is enough if one rank gets the signal: the ranks tell each other in a collective that each step has anyway. In all
other work there is nothing to save, and the signals end the process as usual.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from halo.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, the signals end nothing. Yields a function that says whether this rank got one."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield lambda: bool(came)
    except Stopped:
        raise  # the run is ending: another signal must not interrupt that
    except BaseException:
        _restore(before)
        raise
    _restore(before)
    if came:  # after the last step has asked: all is saved, and the signal ends the work that follows
        signal.raise_signal(came[-1])


@contextmanager
def ignoring_stop_requests() -> Iterator[None]:
    """Inside, the signals do nothing: for a rank that ends when others do."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
