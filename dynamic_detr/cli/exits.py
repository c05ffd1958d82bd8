"""Exit codes of the programs: one line on stderr, and a traceback for unforeseen errors only.

| exit code | meaning |
| --- | --- |
| 0 | done, or saved and stopped by SIGTERM or SIGUSR1 (``--resume`` continues) |
| 1 | an unforeseen error, with its traceback |
| 2 | wrong arguments, configuration, data or weights |
| 3 | training diverged; the last good weights were saved |
| 4 | another process of the run was lost or made no progress (``engine/watch.py``) |
| 130 | saved and stopped by Ctrl-C |
| 128 + n | stopped by signal n with nothing to save: before the training, or ``--eval-only`` |

If a signal interrupts an evaluation in a training of several processes, the code is 0 or 130 even
if the state could not be saved; the line says so.

All processes of a run end with the same code. The process that has the cause prints the line.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from ..engine.stopping import (
    EXIT_INTERRUPTED,
    EXIT_UNFORESEEN,
    EXIT_USER_ERROR,
    TrainingStopped,
)
from ..engine.watch import current_watch, leave
from ..errors import UserError, one_line

__all__ = ["EXIT_USER_ERROR", "report_user_errors"]


def _end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    if current_watch().world_size > 1:
        leave(code)
    sys.exit(code)


@contextlib.contextmanager
def report_user_errors(program: str, debug: bool = False) -> Iterator[None]:
    """Turn :class:`UserError` and :class:`TrainingStopped` into a line on stderr and an exit code.

    Args:
        program: name at the start of the line.
        debug: let user errors through, with their traceback.

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
        if watch.rank == 0 and not stop.printed:
            print(line, file=sys.stderr, flush=True)
        stop.printed = True
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(EXIT_INTERRUPTED)
