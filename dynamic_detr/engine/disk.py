"""When the disk does not take what a run writes: said in one line, and once.

A checkpoint that cannot be written stops the run; the log and the metrics do not: what they could
not write stays in their buffer and goes out when there is room again.
"""

import atexit
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from detectron2.utils.events import EventWriter

from ..errors import UserError, one_line

__all__ = [
    "PatientWriter",
    "logging_to",
    "reason",
    "require_output_dir",
    "telling_of",
]

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
}


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind another one: ``torch.save`` has words of its own for it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def reason(error: BaseException) -> str:
    """Why something could not be written, in a few words."""
    cause = _os_error(error)
    text = cause and (_REASONS.get(cause.errno) or cause.strerror)
    return (text or one_line(error))[:120]


def require_output_dir(folder: str) -> None:
    """See that a folder can be made, or is there and can be written to; writes nothing.

    Args:
        folder: ``OUTPUT_DIR``.

    Raises:
        UserError: it is empty, a file, or out of reach.
    """
    if not folder:
        raise UserError("OUTPUT_DIR is ''; name a folder for checkpoints, logs and metrics")
    place = Path(folder).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise UserError(
            f"OUTPUT_DIR {folder:.200} cannot be a folder: {place} is none; name another one"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"OUTPUT_DIR {folder:.200} cannot be written to: {place} is read-only for this user; "
            "name another folder"
        )


@contextlib.contextmanager
def telling_of(what: str) -> Iterator[None]:
    """Turn errors of writing within this context into one line.

    Args:
        what: is written.

    Raises:
        UserError: it could not be.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _os_error(error) is None or isinstance(error, UserError):
            raise
        raise UserError(f"{what:.300} cannot be written ({reason(error)})") from error


def _warn(what: str, error: BaseException) -> None:
    print(
        f"warning: {what} cannot be written ({reason(error)}); the run goes on without",
        file=sys.stderr,
        flush=True,
    )


class PatientWriter(EventWriter):
    """A writer of metrics that training outlives, and that makes its file only when opened.

    Args:
        make: one of Detectron2's.
    """

    def __init__(self, make: Callable[[], EventWriter]) -> None:
        self._make = make
        self.writer: EventWriter | None = None
        self._warned = False

    def open(self) -> None:
        """Make the writer; before that nothing is written."""
        self.writer = self._make()

    def _try(self, name: str) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, name)()
        except OSError as error:
            if not self._warned:
                _warn(f"what {type(self.writer).__name__} has of the metrics", error)
            self._warned = True

    def write(self) -> None:
        self._try("write")

    def close(self) -> None:
        self._try("close")


@contextlib.contextmanager
def logging_to(folder: str, *names: str) -> Iterator[None]:
    """Set up logging within this context; what it cannot write from then on is told once.

    Args:
        folder: that the log files are in.
        names: of the loggers.

    Raises:
        UserError: the folder or a file in it cannot be made.
    """
    raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with telling_of(f"OUTPUT_DIR {folder}"):
            yield
    finally:
        logging.raiseExceptions = raise_exceptions
    reported: set = set()
    for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
        if isinstance(handler, logging.StreamHandler):
            handler.handleError = partial(_report, handler, reported)
            # Runs before Detectron2's own closing of its file, which would fail once more.
            atexit.register(_leave_quietly, handler.stream, handler.stream is sys.stdout)


def _report(handler: logging.StreamHandler, reported: set, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.Handler.handleError(handler, record)
    elif handler.stream not in reported:
        reported.add(handler.stream)
        _warn(str(getattr(handler.stream, "name", "the log")), error)


def _leave_quietly(stream: TextIO, is_standard: bool) -> None:
    try:
        stream.flush() if is_standard else stream.close()
    except OSError:
        if is_standard:  # the interpreter flushes it again, and would exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # closed already
        pass
