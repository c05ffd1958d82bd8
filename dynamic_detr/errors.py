"""What every room says to a person whose input was wrong."""

import difflib
import os
import sys
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean", "one_line", "tell"]


class UserError(Exception):
    """What was wrong, where, and what to do: one line, for a person who runs a command."""


def one_line(error: BaseException) -> str:
    """The text of an exception on one line; its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean X?)"`` for the known name nearest to ``name``, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def tell(text: str) -> None:
    """Print to standard output; where nobody takes it (a full disk, a closed pipe), go on."""
    try:
        print(text, flush=True)
    except OSError as error:
        print(f"warning: <stdout> cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
