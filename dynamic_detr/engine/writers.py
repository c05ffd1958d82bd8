"""Writers of metrics and hooks that print progress.

A full disk must not end the training: metrics that could not be written stay in the buffer of
their file and are written when there is room again.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.engine.hooks import LRScheduler
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)

from ..files.writing import warn_not_written

__all__ = ["FirstLines", "PatientWriter", "make_writers", "report_rate"]


class PatientWriter(EventWriter):
    """Writer of metrics that warns once, instead of raising, if its file cannot be written.

    Args:
        make: constructs one of Detectron2's writers, which creates its file; called by ``open``.
    """

    def __init__(self, make: Callable[[], EventWriter]) -> None:
        self._make = make
        self.writer: EventWriter | None = None
        self._warned = False

    def open(self) -> None:
        """Construct the writer. Before that, ``write`` does nothing."""
        self.writer = self._make()

    def _try(self, name: str) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, name)()
        except OSError as error:
            if not self._warned:
                warn_not_written(f"metrics of {type(self.writer).__name__}", error)
            self._warned = True

    def write(self) -> None:
        self._try("write")

    def close(self) -> None:
        self._try("close")


def make_writers(output_dir: str, max_iter: int) -> list[PatientWriter]:
    """Return writers to the terminal, ``metrics.json`` and, if it is installed, TensorBoard.

    Detectron2's ``default_writers`` fails without TensorBoard.
    """
    metrics = str(Path(output_dir) / "metrics.json")
    makers = [partial(CommonMetricPrinter, max_iter), partial(JSONWriter, metrics)]
    if importlib.util.find_spec("tensorboard") is not None:
        makers.append(partial(TensorboardXWriter, output_dir))
    return [PatientWriter(make) for make in makers]


class FirstLines(HookBase):
    """Print progress after the first iterations of a run, not only after every twentieth."""

    AFTER = (1, 5)  # iterations

    def before_train(self) -> None:
        # A printer of its own: each divides by the iterations since its last line.
        self.printer = CommonMetricPrinter(self.trainer.max_iter)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done - self.trainer.start_iter in self.AFTER and done < self.trainer.max_iter:
            self.printer.write()


def report_rate(hooks: list, base_lr: float) -> None:
    """Make Detectron2's ``LRScheduler`` hook report a parameter group that has the base rate.

    By default it reports the group with the most parameters, which may be the backbone's.

    Args:
        hooks: hooks of a trainer, after their ``before_train``.
        base_lr: ``SOLVER.BASE_LR``.
    """
    for hook in hooks:
        if isinstance(hook, LRScheduler):
            rates = [group["initial_lr"] for group in hook.scheduler.optimizer.param_groups]
            if base_lr in rates:
                hook._best_param_group_id = rates.index(base_lr)
