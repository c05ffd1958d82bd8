"""SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C ask a run to save its state and stop.

The handler only sets a flag: an exception could be raised while something is half done. A second
Ctrl-C ends the process at once, which damages no file, because files are written atomically.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from ..engine.stopping import EXIT_INTERRUPTED, StopRequest

__all__ = ["listening"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to every process and launchers forward it, so one Ctrl-C arrives twice.
_SAME_SECONDS = 1.0


@contextlib.contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Set ``request.signal`` when a signal arrives, and clear it when this context ends.

    Python allows handlers in the main thread only; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def handle(number: int, frame) -> None:
        nonlocal first
        now = time.monotonic()
        if request.signal is None:
            request.signal, first = signal.Signals(number), now
        elif number == signal.SIGINT and now - first > _SAME_SECONDS:
            os._exit(EXIT_INTERRUPTED)

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        request.signal = None
