"""Errors caused by wrong input, and their texts."""

import difflib
import os
import sys
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean", "is_text", "one_line", "tell"]


class UserError(Exception):
    """Error caused by input, with a one-line message: what was wrong, where, and what to do."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, or its class name if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_text(text: str) -> bool:
    """Return whether a string is valid Unicode; JSON and arguments can hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the most similar known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def tell(text: str) -> None:
    """Print to standard output; discard all output after a failure (full disk, closed pipe)."""
    try:
        print(text, flush=True)
    except OSError as error:
        print(f"warning: <stdout> cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
