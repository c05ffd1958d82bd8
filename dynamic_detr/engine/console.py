"""What a run prints on the terminal: a few lines about itself, then progress from the first
iteration on.

Environment, configuration and model, some five hundred lines, go to ``OUTPUT_DIR/log.txt`` alone;
colours go to terminals alone.
"""

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_setup
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from detectron2.utils.logger import setup_logger
from torch import nn

from .model_file import is_model_file

__all__ = [
    "LOGGERS",
    "FirstLines",
    "log_model",
    "records_kept",
    "start_logging",
]

LOGGERS = ("dynamic_detr", "detectron2", "fvcore")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger(__name__)


class _Plain(logging.Formatter):
    """Without the codes that colour text."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


def _handlers() -> Iterator[logging.StreamHandler]:
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not handler.stream.closed:
                yield handler


@contextlib.contextmanager
def in_the_log_alone() -> Iterator[None]:
    """Within this context only warnings reach the terminal; the log file gets everything."""
    terminal = [h for h in _handlers() if h.stream in (sys.stdout, sys.stderr)]
    levels = [handler.level for handler in terminal]
    try:
        for handler in terminal:
            handler.setLevel(logging.WARNING)
        yield
    finally:
        for handler, level in zip(terminal, levels, strict=True):
            handler.setLevel(level)


@contextlib.contextmanager
def records_kept() -> Iterator[list[logging.LogRecord]]:
    """Within this context, entered before any logging is set up, nothing is logged.

    Yields:
        What would have been, for :func:`start_logging`.
    """
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in LOGGERS]
    settings = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.DEBUG)
        each.propagate = False
    try:
        yield records
    finally:
        for each, (level, propagate) in zip(loggers, settings, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
            each.propagate = propagate


def log_model(model: nn.Module) -> None:
    """The structure of a model for the log, its size for the terminal too."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with in_the_log_alone():
        logger.info(f"Model:\n{model}")
    logger.info(f"{trainable / 1e6:.2f} M trainable parameters")


def start_logging(
    cfg: CfgNode, args: argparse.Namespace, kept: Iterable[logging.LogRecord] = ()
) -> None:
    """Detectron2's ``default_setup``, with a short summary on the terminal.

    Args:
        cfg: of the run.
        args: the command line.
        kept: from :func:`records_kept`; are logged now.
    """
    for name in LOGGERS[::-1]:  # called as `default_setup` does, which then finds them cached
        options = {} if name == "detectron2" else {"name": name}
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), **options)
    plain = _Plain("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    for handler in _handlers():
        if not handler.stream.isatty():
            handler.setFormatter(plain)
    if is_model_file(args.config_file):  # which `default_setup` would print
        args = argparse.Namespace(**{**vars(args), "config_file": ""})
    with in_the_log_alone():
        default_setup(cfg, args)
    for record in kept:
        logging.getLogger(record.name).handle(record)
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    logger.info(
        f"PyTorch {torch.__version__}, Detectron2 {detectron2.__version__}, {device}, processes: "
        f"{comm.get_world_size()}; environment, configuration and model: {cfg.OUTPUT_DIR}/log.txt"
    )


class FirstLines(HookBase):
    """Prints progress after the first iterations of a run too, not only after every twentieth."""

    AFTER = (1, 5)  # iterations

    def before_train(self) -> None:
        # Of its own: the other one divides by the iterations between two of its lines.
        self.printer = CommonMetricPrinter(self.trainer.max_iter)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done - self.trainer.start_iter in self.AFTER and done < self.trainer.max_iter:
            self.printer.write()
