"""Resumable file of COCO results, written image by image."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, one_line
from ..files.writing import write_atomically

__all__ = ["ResultsFile"]


class ResultsFile:
    """COCO results of many images.

    A journal beside the file holds one line per image until `finish` writes the file.

    Args:
        path: the JSON file.
        origin: JSON value that identifies the detector; a journal with another origin is refused.
        resume: continue the journal of an interrupted run.

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
                f"{self.journal} holds results of another detector: remove it, or run without "
                "--resume"
            )
        self.done = {line["picture"] for line in lines[1:]}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Rewritten, because the last line of an interrupted run may be incomplete.
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
        """Append the results of an image.

        Raises:
            UserError: the journal cannot be written.
        """
        try:
            self._write({"picture": picture, "results": results})
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """Write the JSON file from the journal and remove the journal.

        Raises:
            UserError: the file cannot be written.
        """
        self._file.close()
        try:
            write_atomically(self.path, self._write_list)
            self.journal.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_list(self, file: BinaryIO) -> None:
        separator = "[\n"
        for line in self._lines():
            for result in line.get("results", ()):
                file.write(f"{separator}{json.dumps(result)}".encode())
                separator = ",\n"
        file.write(b"[]\n" if separator == "[\n" else b"\n]\n")
