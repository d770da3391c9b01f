"""SIGTERM and SIGUSR1 ask a training run to stop: it finishes the step, saves and ends. So do stages that measure.

One rank's signal is enough, since the ranks tell each other in a collective that each step has anyway. Elsewhere there
is nothing to save, and the signals end the process as ever.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from halo.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, the signals end nothing. Yields a function that says whether one came to this rank."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield lambda: bool(came)
    except Stopped:
        raise  # the run is ending, and another signal must not cut that short
    except BaseException:
        _restore(before)
        raise
    _restore(before)
    if came:  # after the last step's look: it is saved, and what follows was not asked for
        signal.raise_signal(came[-1])


@contextmanager
def ignoring_stop_requests() -> Iterator[None]:
    """Within, the signals do nothing: for a rank that ends when others do."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
