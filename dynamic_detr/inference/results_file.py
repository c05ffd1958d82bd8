"""A file of COCO results that grows picture by picture and can be gone on with after a stop."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

__all__ = ["ResultsFile"]


class ResultsFile:
    """COCO results of many pictures.

    Until `finish` they lie in a journal beside the file, one line for each picture.

    Args:
        path: of the JSON.
        origin: says where results come from, so that those of another model are not mixed in.
        resume: go on with the journal of a run that was stopped.

    Raises:
        UserError: the file cannot be written, or the journal has another origin.
    """

    def __init__(self, path: str, origin: Any, resume: bool) -> None:
        self.path = Path(os.path.expanduser(path))
        self.journal = self.path.with_name(f"{self.path.name}.part")
        origin = json.dumps(origin)
        lines = list(self._lines()) if resume else []
        if lines and lines[0] != {"origin": origin}:
            raise UserError(
                f"{self.journal} holds results of another detector: remove it, or leave "
                "--resume out"
            )
        self.done = {line["picture"] for line in lines[1:]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew, as the last line of a stopped run may be half of one.
            self._file = open(self.journal, "w", encoding="utf-8")  # noqa: SIM115
            for line in lines or [{"origin": origin}]:
                self._write(line)
        except OSError as error:
            raise self._unwritable(error) from error

    def _lines(self) -> Iterator[dict]:
        if not os.path.exists(self.journal):
            return
        with open(self.journal, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    yield json.loads(text)
                except ValueError:
                    return

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--json {self.path} cannot be written ({one_line(error)})")

    def add(self, picture: str, results: list[dict]) -> None:
        """Adds a picture's results.

        Raises:
            UserError: they cannot be written.
        """
        try:
            self._write({"picture": picture, "results": results})
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """Makes the JSON of the journal.

        Raises:
            UserError: it cannot be written.
        """
        self._file.close()
        aside = self.path.with_name(f".{self.path.name}")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                separator = "[\n"
                for line in self._lines():
                    for result in line.get("results", ()):
                        file.write(separator + json.dumps(result))
                        separator = ",\n"
                file.write("[]" if separator == "[\n" else "\n]")
                file.write("\n")
            os.replace(aside, self.path)
            self.journal.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
