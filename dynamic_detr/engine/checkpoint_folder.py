"""Checkpoints in ``OUTPUT_DIR``, possibly of several runs.

Each checkpoint holds the id of its run. ``--resume`` loads the undamaged checkpoint with the
highest iteration of the run that was started last; the file ``last_checkpoint`` only serves
Detectron2's tools. A run deletes only its own checkpoints. If it needs the file name of another
run's checkpoint, that one is renamed to ``<name>_<id>.pth``.
"""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.utils import comm

from ..files.reading import UNNAMED_RUN, BrokenCheckpoint, peek_checkpoint, read_checkpoint
from .sharing import from_main_process

__all__ = ["LAST", "CheckpointFolder", "SavedCheckpoint", "started_with"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"model_(\d{7}|start|final)(_[0-9a-f]{8})?\.pth")
_FEW = re.compile(r"model_(\d{7}|start)\.pth")  # periodic ones; the newest few are kept
LAST = "last_checkpoint"


class SavedCheckpoint(NamedTuple):
    """Checkpoint that can be opened.

    Args:
        path: path of the file.
        run: ``id`` of its run, time when that ``started`` in seconds since 1970, and number of
            ``processes``.
        iteration: last finished iteration, from 0.
    """

    path: Path
    run: dict[str, Any]
    iteration: int


class CheckpointFolder:
    """Folder with the checkpoints of this run and of others.

    Args:
        folder: path of the folder, which need not exist.
        keep: number of periodic checkpoints of this run to keep; 0 keeps all.
    """

    def __init__(self, folder: str, keep: int = 0) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.run: dict[str, Any] = {
            "id": secrets.token_hex(4),
            "started": time.time(),
            "processes": comm.get_world_size(),
        }
        self._own: list[Path] = []  # oldest first

    def _files(self) -> list[Path]:
        files = {path for path in self.folder.glob("model_*.pth") if _NAME.fullmatch(path.name)}
        with contextlib.suppress(OSError, UnicodeDecodeError):  # the file is optional
            if last := (self.folder / LAST).read_text().strip():
                files.add(self.folder / last)
        return sorted(files)

    def __bool__(self) -> bool:
        """Return whether a checkpoint is there, or named in ``last_checkpoint``."""
        return bool(self._files())

    def open_all(
        self, parts: Iterable[str] = ()
    ) -> tuple[list[SavedCheckpoint], list[BrokenCheckpoint]]:
        """Open all checkpoints, sorted by start of the run, then by iteration, newest first.

        Args:
            parts: see :func:`read_checkpoint`.

        Returns:
            The checkpoints, and the errors of those that cannot be opened.
        """
        found, errors = [], []
        for path in self._files():
            try:
                content = peek_checkpoint(path, parts)
            except BrokenCheckpoint as error:
                errors.append(error)
            else:
                run = content.get("run", UNNAMED_RUN)
                found.append(SavedCheckpoint(path, run, content["iteration"]))
        found.sort(key=lambda saved: (saved.run["started"], saved.iteration, saved.path.name))
        return found[::-1], errors

    def last_whole(self, parts: Iterable[str] = ()) -> tuple[Path, dict[str, Any]]:
        """Return path and content of the newest undamaged checkpoint of the latest run.

        Raises:
            BrokenCheckpoint: all of its checkpoints are damaged.
        """
        found, errors = self.open_all(parts)
        for error in errors:
            logger.warning(f"{error}; falling back to another checkpoint")
        candidates = [saved.path for saved in found if saved.run == found[0].run]
        for path in candidates:
            try:
                return path, read_checkpoint(path, parts)
            except BrokenCheckpoint as error:
                logger.warning(f"{error}; falling back to the checkpoint before it")
                errors.append(error)
        raise BrokenCheckpoint(
            f"no checkpoint of the latest run in {self.folder} can be read ({len(errors)} tried; "
            f"the last error: {errors[-1]}); start again without --resume"
        )

    def go_on(self, run: dict[str, Any] | None) -> None:
        """Continue the run of a checkpoint.

        Args:
            run: ``run`` of the checkpoint; None if it has none.
        """
        self.run = run or UNNAMED_RUN
        found, _ = self.open_all()
        self._own = [saved.path for saved in reversed(found) if saved.run == self.run]

    def make_way(self, path: Path) -> None:
        """Rename a checkpoint of another run that has this path.

        Raises:
            OSError: it cannot be renamed.
        """
        if path in self._own or not path.exists():
            return
        try:
            run = peek_checkpoint(path).get("run", UNNAMED_RUN)
        except BrokenCheckpoint:
            return
        if run != self.run:
            kept = path.with_stem(f"{path.stem}_{run['id']}")
            path.rename(kept)
            logger.warning(f"{path} was written by another run; it is now {kept}")

    def remove_parts(self) -> None:
        """Remove the temporary files of saves that were killed; no other run may be saving."""
        for part in self.folder.glob(".model_*.part"):
            part.unlink(missing_ok=True)

    def written(self, path: Path) -> None:
        """Record a checkpoint of this run, and delete its oldest ones beyond ``keep``."""
        self._own = [own for own in self._own if own != path] + [path]
        few = [own for own in self._own if _FEW.fullmatch(own.name)]
        for old in few[: -self.keep] if self.keep else ():
            old.unlink(missing_ok=True)
            self._own.remove(old)


def started_with(folder: str) -> int | None:
    """Return the number of processes that the run to resume was started with.

    Every process calls this; process 0 reads the checkpoints.

    Returns:
        The number; None if there is no such run or its checkpoints do not hold it.
    """

    def read() -> int | None:
        found, _ = CheckpointFolder(folder).open_all()
        return found[0].run["processes"] or None if found else None

    return from_main_process(read)
