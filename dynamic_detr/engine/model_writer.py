"""Model files of a run: the best model so far and the final one."""

import itertools
import logging
import math
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import UserError
from ..files.model_file import SUFFIX, ModelInfo, describe_config, encode_model, read_header
from ..files.writing import as_user_error, reason, write_atomically
from .class_names import data_class_names

__all__ = ["ModelWriter", "describe_model", "write_model"]

logger = logging.getLogger(__name__)


def write_model(path: Path, weights: dict[str, Tensor], info: ModelInfo) -> None:
    """Write a model file atomically, and create its parent folders.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(encode_model(weights, info)))
    except OSError as error:
        raise UserError(f"could not write {path} ({reason(error)})") from error


def describe_model(cfg: CfgNode, results: dict, iteration: int, note: str = "") -> ModelInfo:
    """Return the header of a model file.

    Args:
        cfg: configuration of the training, with its data sets registered.
        results: Detectron2's evaluation results; may be empty.
        iteration: number of training iterations.
        note: any text.
    """
    names = data_class_names(cfg) or []
    indices = {}
    if names:
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        indices = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    metrics = {k: float(v) for k, v in _box_metrics(results).items() if math.isfinite(v)}
    return ModelInfo(
        config=describe_config(cfg),
        class_names=names,
        category_ids=sorted(indices, key=indices.get) if len(indices) == len(names) else [],
        threshold=metrics.pop("threshold", None),
        metrics=metrics,
        iteration=iteration,
        note=note,
    )


def _box_metrics(results: dict) -> dict:
    """Return the metrics of boxes; with several data sets, of the first one."""
    if "bbox" in results:
        return results["bbox"]
    return next((r["bbox"] for r in results.values() if "bbox" in r), {})


class ModelWriter:
    """Writer of ``model_best.safetensors`` and ``model_final.safetensors``.

    Args:
        cfg: configuration of the run, with its data sets registered.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.note = ""
        self.best_ap = -math.inf
        self._own: set[Path] = set()

    def path(self, name: str) -> Path:
        return Path(self.cfg.OUTPUT_DIR) / f"model_{name}{SUFFIX}"

    def resume(self, started: float) -> None:
        """Find the model files of the resumed run, and read its best AP so far.

        Args:
            started: start of the run, seconds since 1970; an older file is of another run.
        """
        paths = [path for path in map(self.path, ("best", "final")) if path.is_file()]
        self._own = {path for path in paths if path.stat().st_mtime >= started}
        if self.path("best") in self._own:
            try:
                best = read_header(str(self.path("best"))).metrics.get("AP", -math.inf)
            except UserError as error:
                logger.warning(f"{error}; it will be overwritten")
            else:
                self.best_ap = best

    def keep(self, model: nn.Module, results: dict, iteration: int) -> None:
        """Write the model if it is the best so far, or the last one.

        Args:
            model: model with the evaluated weights.
            results: evaluation results; empty without a test data set.
            iteration: number of finished iterations.

        Raises:
            UserError: it cannot be written.
        """
        if not comm.is_main_process():
            return
        info = describe_model(self.cfg, results, iteration, self.note)
        ap = info.metrics.get("AP", -math.inf)
        names = []
        if ap >= self.best_ap and "AP" in info.metrics:
            self.best_ap = ap
            names.append("best")
        if iteration >= self.cfg.SOLVER.MAX_ITER:
            names.append("final")
        for name in names:
            self._make_way(self.path(name))
            write_model(self.path(name), model.state_dict(), info)
            score = f", AP {ap:.1f}" if math.isfinite(ap) else ""
            logger.info(f"Saved the model {self.path(name)}{score}")

    def _make_way(self, path: Path) -> None:
        """Rename a model file of another run that has this path.

        Raises:
            UserError: it cannot be renamed.
        """
        if path not in self._own and path.exists():
            free = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(1))
            kept = next(name for name in free if not name.exists())
            with as_user_error(str(path)):
                path.rename(kept)
            logger.warning(f"{path} was written by another run; it is now {kept}")
        self._own.add(path)
