"""Score threshold with the best F1 on an evaluated data set.

AP depends on the order of scores only. A detector with good AP may have low scores everywhere, and
a fixed threshold of 0.5 would then show no box.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["DEFAULT_THRESHOLD", "best_threshold"]

DEFAULT_THRESHOLD = 0.5  # without an evaluation
IOU = 0.5
MAX_DETECTIONS = 100  # per image, as in COCO


def best_threshold(truth: COCO, detections: COCO) -> tuple[float, float]:
    """Return the threshold with the best F1 over all classes together, at an IoU of 0.5.

    Args:
        truth: the annotations.
        detections: result of `truth.loadRes`.

    Returns:
        The threshold, half-way between the lowest score above it and the next one, and the F1 in
        percent. Both are NaN without annotations or without a correct detection.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        matching = COCOeval(truth, detections, "bbox")
        matching.params.iouThrs = np.array([IOU])
        matching.params.areaRng, matching.params.areaRngLbl = [[0, 1e10]], ["all"]
        matching.params.maxDets = [MAX_DETECTIONS]
        matching.evaluate()
    images = [image for image in matching.evalImgs if image is not None]
    objects = sum(int((np.asarray(image["gtIgnore"]) == 0).sum()) for image in images)
    scores = np.concatenate([np.zeros(0), *(image["dtScores"] for image in images)])
    matched = np.concatenate([np.zeros(0), *(image["dtMatches"][0] for image in images)])
    counted = ~np.concatenate([np.zeros(0, bool), *(image["dtIgnore"][0] for image in images)])
    scores, matched = scores[counted.astype(bool)], matched[counted.astype(bool)] > 0
    if not objects or not matched.any():
        return float("nan"), float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(matched[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores pass a threshold together
    last = int(f1.argmax())
    below = scores[last + 1] if last + 1 < len(scores) else scores[last]
    return float(scores[last] + below) / 2, float(100 * f1[last])
