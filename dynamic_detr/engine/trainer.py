"""Detectron2's trainer with this project's optimiser, step, data order and checkpoints."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NoReturn

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

from ..data.loader import TrainLoader, build_test_loader, build_train_loader
from ..data.scenes import register_scenes_of
from ..errors import UserError, one_line
from ..files.writing import as_user_error, reason
from .build import build_detector, distribute
from .checkpoint import SafeCheckpointer
from .class_names import data_class_names
from .clipping import build_clipper
from .diagnosis import describe_error, likely_cause, non_finite_losses
from .ema import ModelEMA
from .evaluation import EvaluationInterrupted, Interruptible, build_evaluator
from .failed_step import FOLDER, FailedStep, save_failed_step
from .model_writer import ModelWriter
from .optimizer import build_optimizer
from .saved_state import check_trainer_state, fill_windows, take_windows
from .schedule import describe_schedule, scale_schedule
from .step import NonFiniteStep, TrainStep, amp_dtype, seed_step
from .stopping import EXIT_DIVERGED, EXIT_UNFORESEEN, TrainingStopped, stop_request
from .tta import DetectorTTA
from .watch import current_watch
from .writers import FirstLines, PatientWriter, make_writers, report_rate

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trainer of any Detectron2 detector that can be stopped at any time and resumed exactly.

    Signals stop it inside of ``cli.signals.listening``.

    Args:
        cfg: configuration; scaled if ``SOLVER.REFERENCE_WORLD_SIZE`` is set.
        scale_to: number of processes to scale to; None for the present number. A resumed run
            keeps the number that it was started with (``started_with``).

    Raises:
        UserError: the configuration cannot be built.
    """

    def __init__(self, cfg: CfgNode, scale_to: int | None = None):
        TrainerBase.__init__(self)
        register_scenes_of(cfg)
        self.cfg = cfg = scale_schedule(cfg, comm.get_world_size(), scale_to)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.finished = -1  # the last iteration whose update is in the weights
        self._windows: dict[str, Tensor] = {}  # of metrics, from a checkpoint
        self._writers: list[PatientWriter] = []  # of process 0
        self._train_loader: TrainLoader | None = None
        self._joins_others = False  # a new run in a folder with checkpoints of another one
        self.stop = stop_request
        self.watch = current_watch()
        self._stopped = False
        # The same in all processes; a resumed run takes it from its checkpoint.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()

        dtype = amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE)
        seed_step(self.seed, -1, comm.get_rank())  # initial weights also depend on the seed
        self.detector = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, self.detector)
        self.ema = ModelEMA(self.detector, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        self._trainer = TrainStep(
            distribute(self.detector),
            self._batches(),
            optimizer,
            build_clipper(cfg),
            self.seed,
            dtype,
            cfg.SOLVER.MAX_SKIPPED_STEPS,
            self.ema,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            self.detector,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            ema=self.ema,
            class_names=partial(data_class_names, cfg),
            trainer=weakref.proxy(self),
        )
        self.models = ModelWriter(cfg)
        self.register_hooks(self.build_hooks())
        self._trainer._hooks = self._hooks  # the step calls their `after_backward`

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model on ``MODEL.DEVICE``."""
        return build_detector(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer):
        try:
            return super().build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            raise UserError(f"the schedule under SOLVER is wrong: {one_line(error)}") from error

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, start_iter: int = 0, seed: int | None = None
    ) -> TrainLoader:
        """Return batches from an iteration on; the seed, ``SEED`` by default, determines them."""
        return build_train_loader(cfg, start_iter, seed=max(cfg.SEED, 0) if seed is None else seed)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Interruptible:
        return Interruptible(build_test_loader(cfg, dataset_name))

    def _batches(self):
        """Yield from the loader, which is built after resuming, when the iteration is known."""
        yield from self._train_loader

    def build_writers(self) -> list[PatientWriter]:
        """Return writers that :meth:`train` opens, so that a refused run writes nothing."""
        self._writers = make_writers(self.cfg.OUTPUT_DIR, self.max_iter)
        return self._writers

    def _open_writers(self) -> None:
        with as_user_error(f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}"):
            for writer in self._writers:
                os.makedirs(self.cfg.OUTPUT_DIR, exist_ok=True)
                writer.open()

    def build_hooks(self) -> list:
        """Return Detectron2's hooks, with interruptible evaluation of the averaged weights."""
        evaluations = [hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)]
        if self.cfg.TEST.AUG.ENABLED:
            evaluations.append(hooks.EvalHook(0, self._evaluate_with_tta))
        result = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PeriodicWriter):
                result.append(FirstLines())
            result += evaluations if isinstance(hook, hooks.EvalHook) else [hook]
        return result

    def _evaluate(self) -> dict:
        def evaluate() -> dict:
            results = self.test(self.cfg, self.detector)
            self.models.keep(self.detector, results, self.finished + 1)
            return results

        self._last_eval_results = self._with_averaged_weights(evaluate)
        return self._last_eval_results

    def _evaluate_with_tta(self) -> dict:
        return self._with_averaged_weights(lambda: self.test_with_tta(self.cfg, self.detector))

    def _with_averaged_weights(self, evaluate) -> dict:
        if self._trainer.stop_agreed:
            self._save_and_stop()
        try:
            with contextlib.nullcontext() if self.ema is None else self.ema.applied():
                self._trainer.statistics.share()  # so that all processes evaluate one model
                return evaluate()
        except Exception as error:
            self._stop_for(error)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate with ``TEST.AUG``; names of the results end in ``_TTA``."""
        logger.info("Evaluating with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, DetectorTTA.from_config(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the newest undamaged checkpoint of the latest run in ``OUTPUT_DIR``, or else
        ``MODEL.WEIGHTS``. Process 0 reads the file and sends its content to the others.
        """
        resumed = resume and self.checkpointer.resume() is not None
        if resumed:
            self.start_iter = self.finished + 1
            self.models.resume(self.checkpointer.files.run["started"])
        else:
            if resume:
                logger.warning(f"No checkpoint in {self.cfg.OUTPUT_DIR}; starting at iteration 0")
            self.checkpointer.load_for_all(self.cfg.MODEL.WEIGHTS)
        self._joins_others = not resumed and self.checkpointer.has_checkpoint()
        self._build_train_loader()

    def _build_train_loader(self) -> None:
        self._train_loader = self.build_train_loader(self.cfg, self.start_iter, self.seed)

    def train(self):
        """Train from ``start_iter`` to ``max_iter``.

        Raises:
            TrainingStopped: a signal or an error stopped it.
        """
        if self._train_loader is None:
            self._build_train_loader()
        self._open_writers()
        images = len(self._train_loader.dataset)
        logger.info(describe_schedule(self.cfg, comm.get_world_size(), self.seed, images))
        if self._joins_others:
            logger.warning(
                f"{self.cfg.OUTPUT_DIR} has checkpoints of an earlier run; they stay, and --resume "
                "continues this run"
            )
            self._save()  # so that --resume takes this run before its first periodic checkpoint
        if comm.is_main_process():
            self.checkpointer.files.remove_parts()
        with self.watch.saving_with(self._save_from_outside):
            return super().train()

    def before_train(self) -> None:
        super().before_train()
        fill_windows(self.storage, self._windows)
        report_rate(self._hooks, self.cfg.SOLVER.BASE_LR)

    def before_step(self) -> None:
        super().before_step()
        self._trainer.stop_requested = bool(self.stop)

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        try:
            self._trainer.run_step()
        except NonFiniteStep as error:
            self._stop_diverged(error)
        except Exception as error:
            self._stop_for(error)
        self.finished = self.iter

    def after_step(self) -> None:
        try:
            super().after_step()
        except Exception as error:  # such as a checkpoint that cannot be written
            self._stop_for(error, save=False)
        if self._trainer.stop_agreed and self.iter + 1 < self.max_iter:
            self._save_and_stop()

    def after_train(self) -> None:
        if self._stopped:
            self._hooks = [h for h in self._hooks if not isinstance(h, hooks.EvalHook)]
        super().after_train()

    def _save(self) -> str:
        """Save the state after the last finished iteration; return the file name."""
        if self.checkpointer.last_iteration != self.finished or self.finished < 0:
            name = f"model_{self.finished:07d}" if self.finished >= 0 else "model_start"
            self.checkpointer.save(name, iteration=self.finished)
        return self.checkpointer.get_checkpoint_file()

    def _saved(self) -> str:
        """Save; return the outcome as the end of a message."""
        try:
            return f"saved {self._save()}, --resume continues from there"
        except Exception as error:  # whatever a disk or a device may raise
            return f"the state could not be saved ({one_line(error)})"

    def _save_from_outside(self) -> str:
        """Save in the thread of the watch, which must not use collective operations."""
        if self.finished < 0:
            return ""
        with self._trainer.seen_from_another_thread():
            return self._saved()

    def _stop(
        self, message: str, code: int, agreed: bool = True, cause: Exception | None = None
    ) -> NoReturn:
        self._stopped = True
        raise TrainingStopped(message, code, agreed) from cause

    def _stopped_by_signal(self) -> str:
        done = f"{self.finished + 1} of {self.max_iter} iterations"
        return f"stopped by {self.stop.name} after {done}"

    def _save_and_stop(self) -> NoReturn:
        """Save and stop for a signal; called on all processes."""
        self.stop.adopt(comm.all_gather(self.stop.signal))
        try:
            path = self._save()
        except UserError as error:
            self._stop_for(error, save=False)
        self._stop(
            f"{self._stopped_by_signal()}; saved {path}, --resume continues from there",
            self.stop.exit_code,
        )

    def _stop_for(self, error: Exception, save: bool = True) -> NoReturn:
        """Stop for an error of this process; process 0 saves, and the other processes end too.

        Raises:
            TrainingStopped: on this process only. In a run of one process, an unforeseen error is
                raised unchanged, after saving.
        """
        self.watch.settle(error)
        # A signal to the whole process group also ends data workers and other processes.
        by_signal = self.stop and isinstance(error, RuntimeError)
        if by_signal or isinstance(error, EvaluationInterrupted):
            if self.stop and self.watch.world_size == 1:
                self._save_and_stop()
            saved = self.watch.fail(self.stop.exit_code, save)
            message = "; ".join(filter(None, (self._stopped_by_signal(), saved)))
            self._stop(message, self.stop.exit_code, agreed=False)
        what, code = describe_error(error, self.cfg, self.watch.world_size, self.detector.training)
        saved = self.watch.fail(code, save)
        if code == EXIT_UNFORESEEN and self.watch.world_size == 1:
            self._stopped = True
            if saved:
                logger.error(f"Stopped after {self.finished + 1} iterations by an error; {saved}")
            raise error
        process = f"process {self.watch.rank}: " if self.watch.world_size > 1 else ""
        message = f"error: {process}{what}; stopped after {self.finished + 1} iterations"
        self._stop(f"{message}, {saved}" if saved else message, code, agreed=False, cause=error)

    def _stop_diverged(self, error: NonFiniteStep) -> None:
        place = non_finite_losses(error.losses) or "the gradient"
        cause = likely_cause(self.cfg, self.detector, self._trainer.batch, self.iter)
        replay = self._keep_failed_step()
        try:
            saved = f"the weights from before it are in {self._save()}"
        except UserError as unsaved:
            saved = one_line(unsaved)
        skipped = f" for {error.skipped} steps in a row" if error.skipped > 1 else ""
        self._stop(
            f"training diverged at iteration {self.iter}: {place} is not finite{skipped}; likely "
            f"cause: {cause}; {saved}{replay}",
            EXIT_DIVERGED,
        )

    def _keep_failed_step(self) -> str:
        """Save the step for a replay; return how to replay it, as the end of a message."""
        folder = Path(self.cfg.OUTPUT_DIR) / FOLDER
        step, scaler = None, self._trainer.scaler
        if comm.is_main_process():
            step = FailedStep(
                iteration=self.iter,
                seed=self.seed,
                processes=comm.get_world_size(),
                dtype=self.cfg.SOLVER.AMP.DTYPE if self._trainer.dtype else "",
                scale=scaler.get_scale() if scaler else 1.0,
                config=self.cfg.dump(),
                model=self.detector.state_dict(),
            )
        try:
            save_failed_step(folder, step, self._trainer.batch, self.iter, comm.get_rank())
        except (OSError, RuntimeError) as error:
            return f"; the step itself could not be kept ({reason(error)})"
        return f"; python tools/replay_step.py {folder} runs the step again and names the module"

    def state_dict(self) -> dict:
        """Return all that a resumed run needs besides the weights."""
        state = TrainerBase.state_dict(self)
        state["iteration"] = self.finished
        state["step"] = self._trainer.state_dict()
        state["optimizer_name"] = type(self.optimizer).__name__
        state["seed"] = self.seed
        state["images_per_batch"] = self.cfg.SOLVER.IMS_PER_BATCH
        state["windows"] = take_windows(self.storage) if hasattr(self, "storage") else {}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a saved state; settings of the optimiser stay those of the configuration.

        Raises:
            UserError: see :func:`check_trainer_state`.
        """
        check_trainer_state(state_dict, self.state_dict(), self.optimizer, self.max_iter)
        configured = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["step"])
        self._set_rates(configured)
        self.finished = state_dict["iteration"]
        self._windows = state_dict.get("windows", {})
        if self.cfg.SEED >= 0 and state_dict["seed"] != self.cfg.SEED:
            logger.warning(
                f"SEED is {self.cfg.SEED}; the resumed run keeps its {state_dict['seed']}"
            )
        self.seed = self._trainer.seed = state_dict["seed"]
        if state_dict["images_per_batch"] != self.cfg.SOLVER.IMS_PER_BATCH:
            logger.warning(
                f"SOLVER.IMS_PER_BATCH was {state_dict['images_per_batch']} and is now "
                f"{self.cfg.SOLVER.IMS_PER_BATCH}; the order of images changes with it"
            )

    def _set_rates(self, configured: list[dict]) -> None:
        """Set learning rate, weight decay, momentum and the like of each parameter group."""
        self.scheduler.base_lrs = [settings["initial_lr"] for settings in configured]
        groups, rates = self.optimizer.param_groups, self.scheduler.get_lr()
        for group, settings, now in zip(groups, configured, rates, strict=True):
            group.update(settings, lr=now)
