"""The command behind ``train_net.py``: what each process of a run does, and how a run starts."""

import argparse
import logging
import multiprocessing

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from .. import compat
from ..threads import choose_threads
from .checkpoint import SafeCheckpointer
from .console import LOGGERS, start_logging
from .disk import logging_to
from .exits import report_user_errors
from .launch import launch
from .reading import require_finite
from .setup import build_parser, load_config, process_count
from .trainer import Trainer

PROGRAM = "train_net.py"

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate the weights of ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint's."""
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, strict_classes=True)
    weights = checkpointer.last_whole_file() if resume else cfg.MODEL.WEIGHTS
    checkpointer.load(weights)
    require_finite(model, weights)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What each process of the run does."""
    compat.ignore_known_warnings()
    with report_user_errors(PROGRAM, args.debug, quiet=not comm.is_main_process()):
        if multiprocessing.parent_process() is not None:  # data sets are registered by process
            cfg = load_config(args)
        with logging_to(cfg.OUTPUT_DIR, *LOGGERS):
            start_logging(cfg, args)
            if cfg.MODEL.DEVICE == "cpu":
                logger.info(choose_threads(comm.get_local_size()))
        if args.eval_only:
            evaluate(cfg, args.resume)
            return
        trainer = Trainer(cfg)
        trainer.models.note = args.note
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


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
