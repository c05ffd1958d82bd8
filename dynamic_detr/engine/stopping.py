"""Early ends of a run: exit codes, the request to stop, and the exception that ends training.

The exit codes are explained in ``cli/exits.py``, which turns errors into them.
"""

import signal
from collections.abc import Iterable

__all__ = [
    "EXIT_DIVERGED",
    "EXIT_INTERRUPTED",
    "EXIT_LOST",
    "EXIT_UNFORESEEN",
    "EXIT_USER_ERROR",
    "StopRequest",
    "TrainingStopped",
    "stop_request",
]

EXIT_UNFORESEEN = 1
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_LOST = 4
EXIT_INTERRUPTED = 130


class TrainingStopped(SystemExit):
    """A run ends early; the message says whether its state was saved.

    It is a ``SystemExit``, so that Detectron2's training loop calls the hooks' ``after_train`` and
    reports no failure.

    Args:
        message: one line for stderr.
        code: exit code of the process.
        agreed: whether every process of the run stops here. Otherwise this process has ended the
            run with :meth:`Watch.fail`.
    """

    def __init__(self, message: str, code: int, agreed: bool = True):
        super().__init__(code)
        self.message = message
        self.agreed = agreed
        self.printed = False  # whether the message has been printed


class StopRequest:
    """Signal that asks this process to stop, if there was one.

    Signal handlers set ``signal`` (``cli/signals.py``). Training exchanges it between the processes
    in each step (``step.py``); an evaluation checks it after each image.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Name of the signal."""
        return self.signal.name if self.signal else "a signal"

    @property
    def exit_code(self) -> int:
        """0 after a save; 130 after Ctrl-C, which also ends a shell's loop over runs."""
        return EXIT_INTERRUPTED if self.signal is signal.SIGINT else 0

    def adopt(self, signals: Iterable[signal.Signals | None]) -> None:
        """Take the first signal among those of all processes, which have agreed to stop."""
        self.signal = next(filter(None, signals), None)


stop_request = StopRequest()  # signal handlers belong to the process, and so does this
