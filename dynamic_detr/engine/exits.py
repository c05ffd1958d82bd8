"""How the command ends: one line on stderr and an exit code, never a traceback for what a user can
mend.

| exit code | meaning |
| --- | --- |
| 0 | done, or saved and stopped by SIGTERM (``--resume`` goes on from there) |
| 1 | an unforeseen error, with its traceback |
| 2 | wrong arguments, configuration, data or weights |
| 3 | training diverged; the last good weights were saved |
| 130 | saved and stopped by Ctrl-C |
"""

import contextlib
import sys
from collections.abc import Iterator

from ..errors import UserError, one_line

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
        on_every_process: whether every process of the run stops with this message.
    """

    def __init__(self, message: str, code: int, on_every_process: bool = True):
        super().__init__(code)
        self.message = message
        self.on_every_process = on_every_process


@contextlib.contextmanager
def report_user_errors(program: str, debug: bool = False, quiet: bool = False) -> Iterator[None]:
    """Turn :class:`UserError` and :class:`TrainingStopped` into a line on stderr and an exit code.

    Args:
        program: name that starts the line.
        debug: let errors through, with their traceback.
        quiet: exit with the code but print nothing (another process prints the same line).

    Raises:
        SystemExit: in place of the caught error.
    """
    try:
        yield
    except UserError as error:
        if debug:
            raise
        if not quiet:
            print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except TrainingStopped as stop:
        if not (quiet and stop.on_every_process):
            print(f"{program}: {stop.message}", file=sys.stderr, flush=True)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(EXIT_INTERRUPTED)
