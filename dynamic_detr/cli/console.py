"""Output of a run: a short summary and progress on the terminal, everything in ``log.txt``.

Environment, configuration and model take some five hundred lines, which only
``OUTPUT_DIR/log.txt`` gets. Only terminals get colours.
"""

import argparse
import atexit
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TextIO

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..files.model_file import is_model_file
from ..files.writing import as_user_error, warn_not_written

__all__ = ["LOGGERS", "log_model", "logging_to", "records_kept", "start_logging"]

LOGGERS = ("dynamic_detr", "detectron2", "fvcore")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger(__name__)


class _Plain(logging.Formatter):
    """Formatter that removes colour codes."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


def _handlers() -> Iterator[logging.StreamHandler]:
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not handler.stream.closed:
                yield handler


@contextlib.contextmanager
def _only_in_the_file() -> Iterator[None]:
    """Within this context the terminal gets warnings only; the log file gets everything."""
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
    """Collect log records instead of logging them; entered before any logging is set up.

    Yields:
        The records, for :func:`start_logging`.
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
    """Log the structure of a model to the file, and its number of parameters everywhere."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with _only_in_the_file():
        logger.info(f"Model:\n{model}")
    logger.info(f"{trainable / 1e6:.2f} M trainable parameters")


def start_logging(
    cfg: CfgNode, args: argparse.Namespace, kept: Iterable[logging.LogRecord] = ()
) -> None:
    """Call Detectron2's ``default_setup``, with a short summary on the terminal.

    Args:
        cfg: configuration of the run.
        args: the command line.
        kept: records of :func:`records_kept`, which are logged now.
    """
    for name in LOGGERS[::-1]:  # the arguments of `default_setup`, which then finds them cached
        options = {} if name == "detectron2" else {"name": name}
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), **options)
    plain = _Plain("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    for handler in _handlers():
        if not handler.stream.isatty():
            handler.setFormatter(plain)
    if is_model_file(args.config_file):  # `default_setup` would print the file
        args = argparse.Namespace(**{**vars(args), "config_file": ""})
    with _only_in_the_file():
        default_setup(cfg, args)
    for record in kept:
        logging.getLogger(record.name).handle(record)
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    logger.info(
        f"PyTorch {torch.__version__}, Detectron2 {detectron2.__version__}, {device}, processes: "
        f"{comm.get_world_size()}; environment, configuration and model: {cfg.OUTPUT_DIR}/log.txt"
    )


@contextlib.contextmanager
def logging_to(folder: str, *names: str) -> Iterator[None]:
    """Set up logging within this context; later errors of writing are reported once per file.

    Args:
        folder: folder of the log files.
        names: names of the loggers.

    Raises:
        UserError: the folder or a file in it cannot be created.
    """
    raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with as_user_error(f"OUTPUT_DIR {folder}"):
            yield
    finally:
        logging.raiseExceptions = raise_exceptions
    reported: set = set()
    for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
        if isinstance(handler, logging.StreamHandler):
            handler.handleError = partial(_report, handler, reported)
            # Runs before Detectron2 closes its file, which would fail again.
            atexit.register(_close_quietly, handler.stream, handler.stream is sys.stdout)


def _report(handler: logging.StreamHandler, reported: set, record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        logging.Handler.handleError(handler, record)
    elif handler.stream not in reported:
        reported.add(handler.stream)
        warn_not_written(str(getattr(handler.stream, "name", "the log")), error)


def _close_quietly(stream: TextIO, is_standard: bool) -> None:
    try:
        stream.flush() if is_standard else stream.close()
    except OSError:
        if is_standard:  # the interpreter flushes it again and would exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # already closed
        pass
