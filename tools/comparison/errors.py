"""Kinds of errors among detections, in the categories of TIDE (Bolya et al., ECCV 2020).

A detection is matched with an object of its class, best scores first, as COCO does it at an IoU of
0.5. One that stays without an object is an error; the first line that fits names its kind:

| kind | |
| --- | --- |
| location | IoU of 0.1 to 0.5 with an object of its class |
| class | IoU of 0.5 or more with an object of another class |
| duplicate | IoU of 0.5 or more with an object of its class that a better one is matched with |
| background | IoU below 0.1 with every object |
| both | the rest: an object of another class, at an IoU of 0.1 to 0.5 |
| missed | an object that is neither matched nor meant by an error of class or location |

A kind costs the AP50 that is gained where all errors of that kind, and of no other, are mended:
class and box are corrected (the detection is removed where that makes it a duplicate); duplicate,
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
MAX_DETECTIONS = 100  # of an image, as COCO counts them


@dataclass(frozen=True)
class Found:
    """The kind of each detection, and the objects that were found and missed.

    Args:
        kinds: of each detection: "correct", "ignored" (on a crowd region), or one of `KINDS`.
        targets: for an error of class or location, the annotation that is meant; else None.
        matched: annotations that a detection is matched with.
        missed: annotations that nothing is meant for.
    """

    kinds: list[str]
    targets: list[dict | None]
    matched: set[int]
    missed: set[int]


def classify(truth: dict, results: list[dict]) -> Found:
    """Gives every detection its kind.

    Args:
        truth: annotations in COCO's format.
        results: COCO results; more than `MAX_DETECTIONS` of an image are left out by the caller.
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
    meant = {target["id"] for target in targets if target}
    missed = {
        a["id"]
        for a in truth["annotations"]
        if not a.get("iscrowd") and a["id"] not in matched | meant
    }
    return Found(kinds, targets, matched, missed)


def _classify_image(objects, results, indices, kinds, targets, matched) -> None:
    """Fills in the detections `indices` of one image, which come best first."""
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
    """(D, N) overlaps of boxes (left, top, width, height); for a crowd, by the detection's area."""
    if not len(boxes) or not annotations:
        return np.zeros((len(boxes), len(annotations)))
    others = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    return np.asarray(iou(boxes, others, [int(a.get("iscrowd", 0)) for a in annotations]))


def error_table(truth: dict, results: list[dict], threshold: float) -> dict[str, dict[str, float]]:
    """For each kind of error "ap50", the gain of mending it, and "count", the number of errors.

    Args:
        truth: annotations in COCO's format.
        results: COCO results, all scores.
        threshold: lowest score of the detections that are counted.
    """
    results = _best_of_each_image(results)
    found = classify(truth, results)
    before = ap50(truth, results)
    confident = [result for result in results if result["score"] >= threshold]
    drawn = classify(truth, confident)
    counts = Counter(drawn.kinds) | Counter({"missed": len(drawn.missed)})
    gains = {kind: ap50(*_mended(kind, truth, results, found)) - before for kind in KINDS}
    return {kind: {"ap50": gains[kind], "count": counts[kind]} for kind in KINDS}


def _best_of_each_image(results: list[dict]) -> list[dict]:
    left: Counter = Counter()
    kept = []
    for result in sorted(results, key=lambda r: -r["score"]):
        left[result["image_id"]] += 1
        if left[result["image_id"]] <= MAX_DETECTIONS:
            kept.append(result)
    return kept


def _mended(kind: str, truth: dict, results: list[dict], found: Found) -> tuple[dict, list[dict]]:
    """Annotations and results without the errors of a kind."""
    if kind == "missed":
        kept = [a for a in truth["annotations"] if a["id"] not in found.missed]
        return {**truth, "annotations": kept}, results
    taken = set(found.matched)
    mended = []
    order = sorted(range(len(results)), key=lambda k: -results[k]["score"])
    for k in order:
        result, target = results[k], found.targets[k]
        if found.kinds[k] != kind:
            mended.append(result)
        elif target and target["id"] not in taken:
            taken.add(target["id"])
            part = "category_id" if kind == "class" else "bbox"
            mended.append({**result, part: target[part]})
    return truth, mended


def ap50(truth: dict, results: list[dict]) -> float:
    """COCO's AP at an IoU of 0.5, in percent; 0 without any detection."""
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
