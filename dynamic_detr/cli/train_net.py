"""Main function of ``train_net.py``, and the part of it that every process of a run executes."""

import argparse
import contextlib
import logging
import multiprocessing

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from .. import compat
from ..engine.checkpoint import SafeCheckpointer
from ..engine.checkpoint_folder import started_with
from ..engine.evaluation import EvaluationInterrupted
from ..engine.stopping import TrainingStopped, stop_request
from ..engine.trainer import Trainer
from ..engine.watch import current_watch
from ..files.reading import require_finite
from ..runtime.threads import choose_threads
from .arguments import build_parser, load_config, process_count
from .console import LOGGERS, log_model, logging_to, records_kept, start_logging
from .exits import report_user_errors
from .launch import launch
from .output_dir import output_locked
from .signals import listening

PROGRAM = "train_net.py"

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint.

    Raises:
        TrainingStopped: a signal arrived; raised on the first process that received it.
    """
    model = Trainer.build_model(cfg)
    log_model(model)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, strict_classes=True)
    weights = checkpointer.last_whole_file() if resume else cfg.MODEL.WEIGHTS
    checkpointer.load(weights)
    require_finite(model, weights)
    with listening(stop_request):
        try:
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
    """Train or evaluate; called in each process of the run."""
    compat.ignore_known_warnings()
    with report_user_errors(PROGRAM, args.debug):
        if multiprocessing.parent_process() is not None:  # each process registers data sets
            cfg = load_config(args)
        current_watch().hang_seconds = cfg.SOLVER.HANG_SECONDS
        if args.eval_only:
            _start_logging(cfg, args)
            evaluate(cfg, args.resume)
            return
        with contextlib.ExitStack() as held:
            with records_kept() as kept:  # a refused run leaves the folder unchanged
                held.enter_context(output_locked(cfg.OUTPUT_DIR))
                trainer = Trainer(cfg, started_with(cfg.OUTPUT_DIR) if args.resume else None)
                trainer.models.note = args.note
                trainer.resume_or_load(resume=args.resume)
            _start_logging(cfg, args, kept)
            log_model(trainer.detector)
            with listening(stop_request):
                trainer.train()


def _start_logging(cfg: CfgNode, args: argparse.Namespace, kept: list | tuple = ()) -> None:
    with logging_to(cfg.OUTPUT_DIR, *LOGGERS):
        start_logging(cfg, args, kept)
    if cfg.MODEL.DEVICE == "cpu":
        logger.info(choose_threads(comm.get_local_size()))


def main() -> None:
    """Read and check the command line, then start the processes.

    Raises:
        SystemExit: with an exit code of ``exits.py``.
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
