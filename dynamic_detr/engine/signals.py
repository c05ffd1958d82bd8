"""SIGTERM and Ctrl-C ask training to stop; it does so between two iterations, state saved.

A handler only leaves a note: the processes agree on the iteration with the next step's reduction
(``step.py``). An evaluation has nothing to agree on and may take long, so there the handler ends it
at once. A second Ctrl-C does not wait for anything.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from .exits import EXIT_INTERRUPTED

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EvaluationInterrupted(BaseException):
    """Raised inside an evaluation by a signal; not an error, so not an ``Exception``."""


class StopRequest:
    """Remembers the signal that asks this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._in_evaluation = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM; 130 after Ctrl-C, so that a shell's loop over runs ends as well."""
        return EXIT_INTERRUPTED if self.signal is signal.SIGINT else 0

    def _handle(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._in_evaluation:
            raise EvaluationInterrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context; in a thread other than the main one, don't."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context a signal raises :class:`EvaluationInterrupted`."""
        self._in_evaluation = True
        try:
            if self:  # the signal came just before
                raise EvaluationInterrupted
            yield
        finally:
            self._in_evaluation = False
