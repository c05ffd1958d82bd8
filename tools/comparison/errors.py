"""Kinds of errors of detections, in the categories of TIDE (Bolya et al., ECCV 2020).

Detections are matched with objects of their class in the order of scores, as in COCO's evaluation
at an IoU of 0.5. A detection without a match is an error. Its kind is the first row that applies:

| kind | |
| --- | --- |
| location | IoU of 0.1 to 0.5 with an object of its class |
| class | IoU of 0.5 or more with an object of another class |
| duplicate | IoU of 0.5 or more with an object of its class that has a match of higher score |
| background | IoU below 0.1 with every object |
| both | the rest: IoU of 0.1 to 0.5 with an object of another class |
| missed | an object that is neither matched nor the target of an error of class or location |

The cost of a kind is the gain in AP50 if only its errors are corrected: the class or the box gets
the target's value, or the detection is removed if it would become a duplicate; duplicates,
background and both are removed; missed objects are removed from the annotations.
"""

import contextlib
import copy
import io
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou

__all__ = ["KINDS", "Found", "ap50", "classify", "error_table"]

KINDS = ("class", "location", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
MAX_DETECTIONS = 100  # per image, as in COCO's evaluation


@dataclass(frozen=True)
class Found:
    """Kinds of the detections, and ids of the matched and missed annotations.

    Args:
        kinds: for each detection "correct", "ignored" (matches a crowd region) or one of `KINDS`.
        targets: for each error of class or location, the annotation it overlaps most; else None.
        matched: ids of matched annotations.
        missed: ids of annotations that are neither matched nor a target.
    """

    kinds: list[str]
    targets: list[dict | None]
    matched: set[int]
    missed: set[int]


def classify(truth: dict, results: list[dict]) -> Found:
    """Classify every detection.

    Args:
        truth: annotations in COCO format.
        results: COCO results, at most `MAX_DETECTIONS` per image.
    """
    objects, detections = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for index, result in enumerate(results):
        detections[result["image_id"]].append(index)
    kinds: list[str] = [""] * len(results)
    targets: list[dict | None] = [None] * len(results)
    matched: set[int] = set()
    for image, indices in detections.items():
        indices.sort(key=lambda k: -results[k]["score"])
        _classify_image(objects[image], results, indices, kinds, targets, matched)
    taken = matched | {target["id"] for target in targets if target}
    objects_only = (a["id"] for a in truth["annotations"] if not a.get("iscrowd"))
    missed = set(objects_only) - taken
    return Found(kinds, targets, matched, missed)


def _classify_image(objects, results, indices, kinds, targets, matched) -> None:
    """Fill in the kinds and targets of one image's detections, `indices` in order of scores."""
    crowds = [a for a in objects if a.get("iscrowd")]
    objects = [a for a in objects if not a.get("iscrowd")]
    boxes = np.array([results[k]["bbox"] for k in indices], dtype=np.float64).reshape(-1, 4)
    overlaps = _iou(boxes, objects)
    on_crowds = _iou(boxes, crowds)
    classes = np.array([a["category_id"] for a in objects])
    crowd_classes = np.array([a["category_id"] for a in crowds])
    free = np.ones(len(objects), dtype=bool)
    rest = []
    for row, k in enumerate(indices):
        same = classes == results[k]["category_id"]
        candidates = np.where(same & free, overlaps[row], -1)
        if len(objects) and candidates.max() >= FOREGROUND:
            best = int(candidates.argmax())
            free[best] = False
            matched.add(objects[best]["id"])
            kinds[k] = "correct"
        elif (on_crowds[row][crowd_classes == results[k]["category_id"]] >= FOREGROUND).any():
            kinds[k] = "ignored"
        else:
            rest.append((row, k))
    for row, k in rest:
        same = classes == results[k]["category_id"]
        own = np.where(same, overlaps[row], 0)
        other = np.where(same, 0, overlaps[row])
        if not len(objects) or overlaps[row].max() < BACKGROUND:
            kinds[k] = "background"
        elif BACKGROUND <= own.max() < FOREGROUND:
            kinds[k], targets[k] = "location", objects[int(own.argmax())]
        elif other.max() >= FOREGROUND:
            kinds[k], targets[k] = "class", objects[int(other.argmax())]
        elif own.max() >= FOREGROUND:
            kinds[k] = "duplicate"
        else:
            kinds[k] = "both"


def _iou(boxes: np.ndarray, annotations: list[dict]) -> np.ndarray:
    """Return the IoU (D, N) of boxes (left, top, width, height) and annotations.

    For a crowd region, it is the intersection over the area of the box.
    """
    if not len(boxes) or not annotations:
        return np.zeros((len(boxes), len(annotations)))
    others = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    return np.asarray(iou(boxes, others, [int(a.get("iscrowd", 0)) for a in annotations]))


def error_table(truth: dict, results: list[dict], threshold: float) -> dict[str, dict[str, float]]:
    """Return the gain in AP50 ("ap50", in percent) and the number of errors ("count") by kind.

    Args:
        truth: annotations in COCO format.
        results: COCO results of all scores.
        threshold: minimum score of the detections that "count" includes.
    """
    results = _best_of_each_image(results)
    found = classify(truth, results)
    before = ap50(truth, results)
    confident = [result for result in results if result["score"] >= threshold]
    shown = classify(truth, confident)
    counts = Counter(shown.kinds) | Counter({"missed": len(shown.missed)})
    gains = {kind: ap50(*_corrected(kind, truth, results, found)) - before for kind in KINDS}
    return {kind: {"ap50": gains[kind], "count": counts[kind]} for kind in KINDS}


def _best_of_each_image(results: list[dict]) -> list[dict]:
    seen: Counter = Counter()
    kept = []
    for result in sorted(results, key=lambda r: -r["score"]):
        seen[result["image_id"]] += 1
        if seen[result["image_id"]] <= MAX_DETECTIONS:
            kept.append(result)
    return kept


def _corrected(
    kind: str, truth: dict, results: list[dict], found: Found
) -> tuple[dict, list[dict]]:
    """Return annotations and results without the errors of a kind."""
    if kind == "missed":
        kept = [a for a in truth["annotations"] if a["id"] not in found.missed]
        return {**truth, "annotations": kept}, results
    taken = set(found.matched)
    corrected = []
    order = sorted(range(len(results)), key=lambda k: -results[k]["score"])
    for k in order:
        result, target = results[k], found.targets[k]
        if found.kinds[k] != kind:
            corrected.append(result)
        elif target and target["id"] not in taken:
            taken.add(target["id"])
            part = "category_id" if kind == "class" else "bbox"
            corrected.append({**result, part: target[part]})
    return truth, corrected


def ap50(truth: dict, results: list[dict]) -> float:
    """Compute COCO's AP at an IoU of 0.5, in percent; 0 without detections."""
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.iouThrs = np.array([FOREGROUND])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    precision = precision[precision > -1]
    return float(100 * precision.mean()) if precision.size else 0.0
