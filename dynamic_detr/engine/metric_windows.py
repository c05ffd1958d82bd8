"""The last values of every smoothed metric, kept in checkpoints.

Detectron2's writers give the median of the last 20 values; with these a resumed run writes the
numbers of the run that was never stopped. Times are left out: they are the machine's.
"""

from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

__all__ = ["check_windows", "fill_windows", "take_windows"]

_WINDOW = 20  # of Detectron2's writers
_TIMES = ("time", "data_time")


def take_windows(storage: EventStorage) -> dict[str, Tensor]:
    """The values that a writer would smooth.

    Returns:
        (n, 2) float64 for each metric, n <= 20: value and iteration, the oldest first.
    """
    hints = storage.smoothing_hints()
    return {
        name: torch.tensor(history.values()[-_WINDOW:], dtype=torch.float64)
        for name, history in storage.histories().items()
        if hints.get(name) and name not in _TIMES
    }


def check_windows(windows: Any) -> None:
    """See that something from a checkpoint is what :func:`take_windows` gave.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(windows, dict):
        raise ValueError(f"its windows are {windows!r:.40}, not a dict")
    for name, window in windows.items():
        like = isinstance(window, Tensor) and window.dtype is torch.float64 and not window.is_meta
        if not isinstance(name, str) or not like or window.shape[1:] != (2,):
            raise ValueError(
                f"its window {name!r:.40} is {window!r:.40}, not values and iterations"
            )


def fill_windows(storage: EventStorage, windows: dict[str, Tensor]) -> None:
    """Put back what :func:`take_windows` gave; nothing of it will be written once more."""
    for name, window in windows.items():
        for value, iteration in window.tolist():
            storage.histories()[name].update(value, int(iteration))
