"""How the command ends: one line on stderr and an exit code, never a traceback for what a user can
mend.

| exit code | meaning |
| --- | --- |
| 0 | done, or saved and stopped by SIGTERM or SIGUSR1 (``--resume`` goes on from there) |
| 1 | an unforeseen error, with its traceback |
| 2 | wrong arguments, configuration, data or weights |
| 3 | training diverged; the last good weights were saved |
| 4 | another process of the run was lost or made no progress (``watch.py``) |
| 130 | saved and stopped by Ctrl-C |
| 128 + n | stopped by signal n with nothing to save: before the training, or ``--eval-only`` |

All processes of a run end with the same code, and the one that has the cause prints the line.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from ..errors import UserError, one_line
from .watch import EXIT_LOST, current_watch, leave

__all__ = ["EXIT_DIVERGED", "EXIT_INTERRUPTED", "EXIT_LOST", "EXIT_UNFORESEEN"]
__all__ += ["EXIT_USER_ERROR", "TrainingStopped", "report_user_errors"]

EXIT_UNFORESEEN = 1
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130


class TrainingStopped(SystemExit):
    """Training ends early and in good order: its state is on disk.

    A ``SystemExit``, so that Detectron2's training loop runs the hooks' ``after_train`` and does
    not report a failure.

    Args:
        message: one line for stderr.
        code: exit code of the process (see the module's table).
        agreed: whether every process of the run stops here; else this one has ended the run by
            :meth:`Watch.fail`.
    """

    def __init__(self, message: str, code: int, agreed: bool = True):
        super().__init__(code)
        self.message = message
        self.agreed = agreed
        self.told = False  # whether the line has been printed


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    if current_watch().world_size > 1:
        leave(code)
    sys.exit(code)


@contextlib.contextmanager
def report_user_errors(program: str, debug: bool = False) -> Iterator[None]:
    """Turn :class:`UserError` and :class:`TrainingStopped` into a line on stderr and an exit code.

    Args:
        program: name that starts the line.
        debug: let errors through, with their traceback.

    Raises:
        SystemExit: in place of the caught error.
    """
    watch = current_watch()
    try:
        yield
    except UserError as error:
        if debug:
            raise
        watch.fail(EXIT_USER_ERROR)
        _end(f"{program}: error: {one_line(error)}", EXIT_USER_ERROR)
    except TrainingStopped as stop:
        line = f"{program}: {stop.message}"
        if not stop.agreed:
            if stop.code == EXIT_UNFORESEEN:
                traceback.print_exception(stop.__cause__)
            _end(line, stop.code)
        if watch.rank == 0 and not stop.told:
            print(line, file=sys.stderr, flush=True)
        stop.told = True
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(EXIT_INTERRUPTED)
