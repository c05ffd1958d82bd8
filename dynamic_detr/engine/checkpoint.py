"""Checkpoints: written atomically, checked when they are read, the newest few kept.

A checkpoint holds tensors and plain types only (``torch.load(weights_only=True)`` reads it):

| key | content |
| --- | --- |
| ``model`` | weights for inference: the moving average, if there is one |
| ``model_training`` | with a moving average: the weights that training continues from |
| ``ema_updates`` | with a moving average: its number of updates |
| ``trainer`` | iteration, optimiser, schedule, loss scale, seed (see ``trainer.py``) |
| ``iteration`` | the last finished iteration, from 0 |
| ``run`` | ``id`` of the run, time when it ``started`` (Unix), number of ``processes`` |
| ``class_names`` | names of the classes by index, if the data set has them |

Everything that loads a Detectron2 checkpoint (``MODEL.WEIGHTS``, the demo, Detectron2's predictor)
gets the averaged weights; only ``--resume`` reads the rest.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..files.model_file import is_model_file, locate_model, read_model
from ..files.plain_pickle import plain_pickles
from ..files.reading import broken, check_archive, check_class_names, check_weights
from ..files.writing import reason, write_atomically
from .checkpoint_folder import LAST, CheckpointFolder
from .ema import ModelEMA
from .sharing import from_main_process

# Detectron2's class layers are called cls_score; with class-wise boxes or masks also bbox_pred and
# predictor.
_CLASS_LAYER = re.compile("class|cls|pred|logits")
_MISFITS = (ValueError, AssertionError, LookupError, TypeError, AttributeError, RuntimeError)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes, checked reads and one-line messages.

    Args:
        model: the model, wrapped for data parallelism or not.
        save_dir: local directory of the run; "" to save nothing.
        keep: number of periodic checkpoints of the run to keep; 0 keeps all.
        ema: average that is saved as the model's weights.
        strict_classes: raise an error if class layers do not fit (evaluation), instead of
            initialising them (fine-tuning).
        class_names: returns the class names; called at every save, because some data sets have
            them only after loading.
        checkpointables: as in Detectron2.

    Raises:
        UserError: ``keep`` is 1 or negative.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int = 0,
        ema: ModelEMA | None = None,
        strict_classes: bool = False,
        class_names: Callable[[], list[str] | None] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        if keep < 0 or keep == 1:
            raise UserError(
                f"SOLVER.KEEP_CHECKPOINTS is {keep}; it must be 2 or more (if the last one is "
                "damaged, the one before it is used), or 0 to keep all"
            )
        self.files = CheckpointFolder(save_dir, keep)
        self.ema = ema
        self.strict_classes = strict_classes
        self.class_names = class_names
        self.last_iteration = -1  # of the checkpoint that `--resume` would load
        self.last_file = ""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``<save_dir>/<name>.pth``, which ``--resume`` then loads.

        Raises:
            UserError: it cannot be written (a full disk); earlier files are unchanged.
        """
        path = Path(self.save_dir) / f"{name}.pth"
        if not self.save_dir or not self.save_to_disk:
            self.last_file = str(path)  # process 0 writes it
            return
        data: dict[str, Any] = {}
        if self.ema is None:
            data["model"] = self.model.state_dict()
        else:
            data["model"] = self.ema.state_dict()
            data["model_training"] = self.model.state_dict()
            data["ema_updates"] = self.ema.updates
        for key, value in self.checkpointables.items():
            data[key] = value.state_dict()
        if self.class_names is not None and (names := self.class_names()):
            data["class_names"] = names
        data["run"] = self.files.run
        data.update(extra)
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files.make_way(path)
            write_atomically(path, lambda file: torch.save(data, file))
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise UserError(f"could not write {path} ({reason(error)})") from error
        self.last_iteration, self.last_file = extra.get("iteration", -1), str(path)
        self.files.written(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint to a file, for Detectron2's tools."""
        tag = Path(self.save_dir) / LAST
        write_atomically(tag, lambda file: file.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        """Return whether the directory has a checkpoint of any run."""
        return bool(self.save_dir) and bool(self.files)

    def get_checkpoint_file(self) -> str:
        """Return the file that this run has saved or resumed; else that of ``last_checkpoint``."""
        return self.last_file or super().get_checkpoint_file()

    def last_whole_file(self) -> str:
        """Return the path of the checkpoint that ``--resume`` would load.

        Raises:
            UserError: there is none.
        """
        if not self.has_checkpoint():
            raise UserError(f"there is no checkpoint in OUTPUT_DIR {self.save_dir} to resume")
        return str(self.files.last_whole(self.checkpointables)[0])

    def resume(self) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint of the latest run; every process calls this.

        Returns:
            Content of the checkpoint except the model and the checkpointables; None if the
            directory has no checkpoint.

        Raises:
            BrokenCheckpoint: all checkpoints are damaged.
            UserError: the checkpoint does not fit the model, the data or the checkpointables.
        """
        path, checkpoint = from_main_process(self._last_whole)
        if checkpoint is None:
            return None
        average = None
        if "model_training" in checkpoint:
            average = checkpoint["model"]
            checkpoint["model"] = checkpoint.pop("model_training")
        names, saved = self.class_names and self.class_names(), checkpoint.get("class_names")
        if names and saved and names != saved:
            raise UserError(
                f"{path} has the classes {_some(saved)} in this order, and the data "
                f"{_some(names)}; resume with the data of that run, or train in another OUTPUT_DIR"
            )
        self.logger.info(f"Resuming from {path}")
        misfits = self._load_model(checkpoint)
        if misfits.incorrect_shapes or misfits.missing_keys:
            names = [entry[0] for entry in misfits.incorrect_shapes] + misfits.missing_keys
            raise UserError(
                f"{path} was saved by another model than this configuration's ({_some(names)}); "
                "resume with the configuration of that run, or train in another OUTPUT_DIR"
            )
        for key, target in self.checkpointables.items():
            if key in checkpoint:
                target.load_state_dict(checkpoint.pop(key))
        if self.ema is None:
            if average is not None:
                self.logger.warning(
                    f"SOLVER.EMA.ENABLED is False; the moving average in {path} is not continued"
                )
        else:
            if average is None:
                self.ema.restart()
            else:
                self.ema.load(average, checkpoint.pop("ema_updates"))
        self.last_iteration, self.last_file = checkpoint.get("iteration", -1), path
        if self.save_to_disk:
            self.files.go_on(checkpoint.get("run"))
        return checkpoint

    def _last_whole(self) -> tuple[str, dict[str, Any] | None]:
        if not self.has_checkpoint():
            return "", None
        path, checkpoint = self.files.last_whole(self.checkpointables)
        return str(path), checkpoint

    def load_for_all(self, path: str) -> None:
        """Load weights in process 0 and send them to all; every process calls this.

        Raises:
            UserError: in every process; see :meth:`load`.
        """

        def weights() -> dict[str, Tensor]:
            self.load(path, checkpointables=[])
            return self.model.state_dict()

        received = from_main_process(weights)
        if not comm.is_main_process():
            self.model.load_state_dict(received)
            if self.ema is not None:
                self.ema.restart()

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and by default the checkpointables, from a path or a URL.

        Raises:
            UserError: the file is missing, cannot be fetched or is damaged; or its class layers do
                not fit and ``strict_classes`` is set.
        """
        if path:
            path = locate_model(path)
            self._require(path)
        try:
            rest = super().load(path, checkpointables)
        except _MISFITS as error:  # Detectron2's matching of names and shapes fails in many ways
            raise broken(path, error) from error
        if self.ema is not None:
            self.ema.restart()
        return rest

    def read(self, path: str) -> dict[str, Any]:
        """Return the content of a file of weights, from a path or a URL.

        Raises:
            UserError: see :meth:`load`.
        """
        return self._load_file(self._require(locate_model(path)))

    def _require(self, path: str) -> str:
        """Return the local file of a path or of a URL such as ``detectron2://...``."""
        try:
            local = self.path_manager.get_local_path(path.partition("?")[0])
        except Exception as error:  # network libraries raise many types
            raise UserError(
                f"could not fetch the weights {path} ({one_line(error)[:120]}); without a network, "
                "copy the file here and set MODEL.WEIGHTS to its path"
            ) from error
        if not os.path.isfile(local):
            raise UserError(f"the weights {path} do not exist; check MODEL.WEIGHTS")
        return local

    def _load_file(self, filename: str) -> dict[str, Any]:
        if is_model_file(filename):
            info, weights = read_model(filename)
            return {"model": weights, "class_names": info.class_names or None}
        try:
            check_archive(filename)
            with plain_pickles(detection_checkpoint):
                loaded = super()._load_file(filename)
            check_weights(loaded["model"])
            check_class_names(loaded.get("class_names"))
            return loaded
        except UserError:
            raise
        except Exception as error:  # torch, pickle and zip each have their own errors
            raise broken(filename, error) from error

    def _log_incompatible_keys(self, incompatible) -> None:
        """Log one line on class layers of another size, and one on all other misfits."""
        misfits = list(incompatible.incorrect_shapes)
        classes = [entry for entry in misfits if _is_class_layer(*entry)]
        if classes and self.strict_classes:
            name, saved, built = classes[0]
            raise UserError(
                f"the weights were trained with another number of classes: {name} has "
                f"{saved[0]} rows there and {built[0]} here; set NUM_CLASSES to that of the "
                "weights (MODEL.SET_DETECTOR.NUM_CLASSES for a DynamicDETR), or name the model "
                "file that training wrote beside them, *.safetensors, which needs no configuration"
            )
        if classes:
            self.logger.warning(
                "The weights have another number of classes; newly initialised: "
                + ", ".join(f"{name} {saved} -> {built}" for name, saved, built in classes)
            )
        others = [entry[0] for entry in misfits if entry not in classes]
        if others:
            self.logger.warning(
                f"These weights have another shape than the model's and are not used: "
                f"{_some(others)}"
            )
        reported = {entry[0] for entry in misfits}
        missing = [key for key in incompatible.missing_keys if key not in reported]
        super()._log_incompatible_keys(
            incompatible._replace(missing_keys=missing, incorrect_shapes=[])
        )


def _is_class_layer(name: str, saved: tuple[int, ...], built: tuple[int, ...]) -> bool:
    """Return whether two shapes of a class layer differ in the number of rows only."""
    return saved[1:] == built[1:] and _CLASS_LAYER.search(name) is not None


def _some(names: list[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
