"""SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C ask a run to stop, with its state saved.

A handler leaves a note and never raises, as an exception could come up where something is half
done. In training the processes agree on the iteration with the next step's reduction
(``step.py``); an evaluation looks at the note between two images (``evaluation.py``). A second
Ctrl-C ends the process at once; files are written whole or not at all, so none is damaged.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

from .exits import EXIT_INTERRUPTED

__all__ = ["StopRequest", "stop_request"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to every process, and launchers forward it: the same one comes twice.
_SAME_SECONDS = 1.0


class StopRequest:
    """Remembers the signal that asks this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._listening = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal."""
        return self.signal.name if self.signal else "a signal"

    @property
    def exit_code(self) -> int:
        """0 after a save; 130 after Ctrl-C, so that a shell's loop over runs ends as well."""
        return EXIT_INTERRUPTED if self.signal is signal.SIGINT else 0

    def adopt(self, signals: Iterable[signal.Signals | None]) -> None:
        """Take over the first signal of all processes that have agreed to stop."""
        self.signal = next(filter(None, signals), None)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._since > _SAME_SECONDS:
            os._exit(EXIT_INTERRUPTED)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context; in a thread other than the main one, don't."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal, self._listening = None, True
        previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._listening = False


stop_request = StopRequest()  # of this process, as its signal handlers are
