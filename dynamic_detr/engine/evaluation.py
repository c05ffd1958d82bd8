"""COCO evaluation of a model, with or without test-time augmentation.

It can be interrupted after each image. Processes have different numbers of images, so all wait for
the last one before the first collective operation.
"""

import os
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from .. import compat
from ..errors import UserError
from ..files.writing import as_user_error
from .stopping import stop_request
from .threshold import best_threshold
from .watch import current_watch


class EvaluationInterrupted(Exception):
    """A signal asks this process to stop, or another process has ended the run."""


def _poll() -> None:
    if stop_request or current_watch().ended:
        raise EvaluationInterrupted


class Interruptible:
    """Loader of images that checks for a stop after each image.

    Args:
        loader: loader with a length, which Detectron2 requires.

    Raises:
        EvaluationInterrupted: while iterating.
    """

    def __init__(self, loader: Iterable[list[dict]]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        _poll()
        try:
            for index, inputs in enumerate(self.loader):
                current_watch().progress(f"evaluating its image {index}")
                yield inputs
                _poll()
        except RuntimeError:  # a signal to the whole process group also ends data workers
            _poll()
            raise


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> COCOEvaluator:
    """Build the COCO evaluator of a data set.

    Args:
        cfg: configuration; reads ``OUTPUT_DIR``.
        dataset_name: name in Detectron2's catalogues.
        output_folder: folder of the detections; by default ``OUTPUT_DIR/inference``.

    Raises:
        UserError: the data set is not evaluated as COCO is.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "coco_panoptic_seg"):
        raise UserError(
            f"the data set {dataset_name} in DATASETS.TEST is evaluated by {kind!r} rules; this "
            "project evaluates COCO boxes only: register it as a COCO data set"
        )
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    with as_user_error(folder):
        return BoxEvaluator(dataset_name, folder)


class BoxEvaluator(COCOEvaluator):
    """Detectron2's evaluator, with the score threshold of the best F1 ("threshold" and "F1").

    It waits for all processes before it evaluates, and reports errors of writing in one line.

    Args:
        dataset_name: name in Detectron2's catalogues.
        output_dir: folder of the detections.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        # The fast implementation is compiled.
        fast = compat.has_compiled_ops()
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=fast)

    def evaluate(self, img_ids=None) -> dict | None:
        current_watch().meet(_poll)
        current_watch().progress("gathering and scoring the detections")
        with as_user_error(f"the detections in {self._output_dir}"):
            return super().evaluate(img_ids)

    def _derive_coco_results(self, coco_eval, iou_type: str, class_names=None) -> dict:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "bbox":
            found = (float("nan"),) * 2
            if coco_eval is not None:
                found = best_threshold(coco_eval.cocoGt, coco_eval.cocoDt)
            results["threshold"], results["F1"] = found
        return results
