"""Writing files whole or not at all, and one-line errors when the disk refuses."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError, one_line

__all__ = ["as_user_error", "reason", "warn_not_written", "write_atomically"]

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], object], shared: bool = False) -> None:
    """Write a temporary file beside ``path``, sync it to disk, and rename it to ``path``.

    After a crash at any moment ``path`` holds its old or its new content, never a part.

    Args:
        path: the file; its folder must exist.
        write: writes the content to an open binary file.
        shared: whether several processes may write this file at the same time; each then has a
            temporary file of its own.

    Raises:
        OSError: the file cannot be written. ``path`` is unchanged.
    """
    process = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{process}.part")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system error that caused an error; ``torch.save`` raises RuntimeError for it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def reason(error: BaseException) -> str:
    """Return why a file could not be written, in a few words."""
    cause = _os_error(error)
    text = cause and (_REASONS.get(cause.errno) or cause.strerror)
    return (text or one_line(error))[:120]


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Convert errors of writing within this context.

    Args:
        what: the file or folder, for the message.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _os_error(error) is None or isinstance(error, UserError):
            raise
        raise UserError(f"{what:.300} cannot be written ({reason(error)})") from error


def warn_not_written(what: str, error: BaseException) -> None:
    """Print a warning to stderr; the run continues."""
    print(
        f"warning: {what} cannot be written ({reason(error)}); the run continues without it",
        file=sys.stderr,
        flush=True,
    )
