"""The command behind ``train_net.py``: what each process of a run does, and how a run starts."""

import argparse
import contextlib
import logging
import multiprocessing

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from .. import compat
from ..threads import choose_threads
from .checkpoint import SafeCheckpointer
from .checkpoint_folder import started_with
from .console import LOGGERS, log_model, records_kept, start_logging
from .disk import logging_to
from .evaluation import EvaluationInterrupted
from .exits import TrainingStopped, report_user_errors
from .launch import launch
from .output_lock import output_locked
from .reading import require_finite
from .setup import build_parser, load_config, process_count
from .signals import stop_request
from .trainer import Trainer
from .watch import current_watch

PROGRAM = "train_net.py"

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate the weights of ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint's.

    Raises:
        TrainingStopped: after a signal, on the first process that has it.
    """
    model = Trainer.build_model(cfg)
    log_model(model)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, strict_classes=True)
    weights = checkpointer.last_whole_file() if resume else cfg.MODEL.WEIGHTS
    checkpointer.load(weights)
    require_finite(model, weights)
    try:
        with stop_request.listening():
            results = Trainer.test(cfg, model)
            if cfg.TEST.AUG.ENABLED:
                results.update(Trainer.test_with_tta(cfg, model))
    except EvaluationInterrupted:
        code = 128 + (stop_request.signal or 0)
        current_watch().fail(code)
        raise TrainingStopped(
            f"the evaluation was stopped by {stop_request.name}", code, agreed=False
        ) from None
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What each process of the run does."""
    compat.ignore_known_warnings()
    with report_user_errors(PROGRAM, args.debug):
        if multiprocessing.parent_process() is not None:  # data sets are registered by process
            cfg = load_config(args)
        current_watch().hang_seconds = cfg.SOLVER.HANG_SECONDS
        if args.eval_only:
            _start_logging(cfg, args)
            evaluate(cfg, args.resume)
            return
        with contextlib.ExitStack() as held:
            with records_kept() as kept:  # a run that is refused leaves the folder as it was
                held.enter_context(output_locked(cfg.OUTPUT_DIR))
                trainer = Trainer(cfg, started_with(cfg.OUTPUT_DIR) if args.resume else None)
                trainer.models.note = args.note
                trainer.resume_or_load(resume=args.resume)
            _start_logging(cfg, args, kept)
            trainer.train()


def _start_logging(cfg: CfgNode, args: argparse.Namespace, kept: list | tuple = ()) -> None:
    with logging_to(cfg.OUTPUT_DIR, *LOGGERS):
        start_logging(cfg, args, kept)
    if cfg.MODEL.DEVICE == "cpu":
        logger.info(choose_threads(comm.get_local_size()))


def main() -> None:
    """Read the command line, check everything, start the processes.

    Raises:
        SystemExit: with the exit codes of ``exits.py``.
    """
    compat.ignore_known_warnings()
    args = build_parser().parse_args()
    with report_user_errors(PROGRAM, args.debug):
        cfg = load_config(args)
        launch(
            run,
            process_count(cfg, args),
            cfg.MODEL.DEVICE.startswith("cuda"),
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            (args, cfg),
        )
