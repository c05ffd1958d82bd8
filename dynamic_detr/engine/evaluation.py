"""COCO evaluation of a model, plain or with test-time augmentation.

It can be interrupted between two images. Processes have different numbers of images, so none
enters a collective operation before all have come to the end of theirs.
"""

import os
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from .. import compat
from ..errors import UserError
from .disk import telling_of
from .signals import stop_request
from .threshold import best_threshold
from .watch import current_watch


class EvaluationInterrupted(Exception):
    """A signal wants this process to stop, or the run has ended because of another one."""


def _poll() -> None:
    if stop_request or current_watch().ended:
        raise EvaluationInterrupted


class Interruptible:
    """A loader of images for an evaluation that can be interrupted between two of them.

    Args:
        loader: has a length, as Detectron2 asks for.

    Raises:
        EvaluationInterrupted: while iterating.
    """

    def __init__(self, loader: Iterable[list[dict]]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        _poll()
        for index, inputs in enumerate(self.loader):
            current_watch().progress(f"evaluating its image {index}")
            yield inputs
            _poll()


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """The COCO evaluator of a data set.

    Args:
        cfg: reads ``OUTPUT_DIR``.
        dataset_name: as registered with Detectron2.
        output_folder: where the detections are written; ``OUTPUT_DIR/inference`` by default.

    Raises:
        UserError: the data set is not of COCO's kind.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "coco_panoptic_seg"):
        raise UserError(
            f"the data set {dataset_name} in DATASETS.TEST is evaluated by {kind!r} rules; this "
            "project evaluates COCO boxes only: register it as a COCO data set"
        )
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    with telling_of(folder):
        return _Telling(compat.coco_evaluator(dataset_name, folder, BoxEvaluator), folder)


class BoxEvaluator(COCOEvaluator):
    """Detectron2's evaluator, with the threshold of the best F1 ("threshold" and "F1")."""

    def _derive_coco_results(self, coco_eval, iou_type: str, class_names=None) -> dict:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "bbox":
            found = (float("nan"),) * 2
            if coco_eval is not None:
                found = best_threshold(coco_eval.cocoGt, coco_eval.cocoDt)
            results["threshold"], results["F1"] = found
        return results


class _Telling(DatasetEvaluator):
    """An evaluator that waits for all processes, and says in one line that it cannot write.

    Args:
        evaluator: writes them at the end of an evaluation.
        folder: where to.
    """

    def __init__(self, evaluator: DatasetEvaluator, folder: str) -> None:
        self.evaluator = evaluator
        self.folder = folder
        self.reset, self.process = evaluator.reset, evaluator.process

    def evaluate(self) -> dict | None:
        current_watch().meet(_poll)
        current_watch().progress("gathering and scoring the detections")
        with telling_of(f"the detections in {self.folder}"):
            return self.evaluator.evaluate()
