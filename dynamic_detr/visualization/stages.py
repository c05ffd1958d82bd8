"""How the boxes of each query move from stage to stage, side by side: Figure 4 of the paper.

The queries are chosen by what the last stage says of them, and keep their colours, so that a box
can be followed back to the first stage, where it still covers most of the picture.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..layers import class_scores
from ..structures import Prediction, box_cxcywh_to_xyxy
from .draw import color, draw_boxes, labels, rescaled, resized
from .sheet import contact_sheet

__all__ = ["draw_stages", "follow_queries"]

# Longer side of each stage's picture in pixels; smaller and larger ones are scaled to these.
PANEL = (384, 640)
MAX_QUERIES = 20  # more boxes than that hide each other


def follow_queries(
    predictions: Sequence[Prediction],
    image_size: tuple[int, int],
    class_head: str,
    threshold: float = 0.5,
    limit: int = MAX_QUERIES,
) -> list[Instances]:
    """The same queries at every stage, chosen by their best score at the last one.

    Args:
        predictions: of the stages, for one image (B = 1).
        image_size: (height, width) in pixels that the boxes are wanted in.
        class_head: "focal" (K sigmoids) or "softmax" (K classes and "no object").
        threshold: lowest score at the last stage.
        limit: the most queries that are chosen.

    Returns:
        For each stage N instances, in the same order, the best of the last stage first: queries
        (indices), pred_boxes (corners in pixels), and the scores and pred_classes of that stage.
    """
    stages, finite = [], True
    for prediction in predictions:
        if prediction.is_proposal:  # proposals are of other queries
            continue
        logits = prediction.pred_logits[0].float()  # (Q, K)
        scores = class_scores(logits, class_head)
        best, classes = scores.max(dim=-1)  # (Q,)
        boxes = prediction.pred_boxes[0].float().cpu()
        stages.append((best.cpu(), classes.cpu(), boxes))
        finite = finite & boxes.isfinite().all(dim=-1)
    final = stages[-1][0].masked_fill(~finite, -1)
    queries = final.argsort(descending=True)[:limit]
    queries = queries[final[queries] >= threshold]
    height, width = image_size
    size = torch.tensor([width, height, width, height])
    followed = []
    for scores, classes, boxes in stages:
        corners = Boxes(box_cxcywh_to_xyxy(boxes[queries]) * size)
        corners.clip(image_size)
        followed.append(
            Instances(
                image_size,
                queries=queries,
                pred_boxes=corners,
                scores=scores[queries],
                pred_classes=classes[queries],
            )
        )
    return followed


def draw_stages(image: np.ndarray, stages: Sequence[Instances], metadata=None) -> np.ndarray:
    """Draws the boxes of every stage in one row; the last picture names their classes.

    Args:
        image: (H, W, 3) uint8, RGB.
        stages: of `follow_queries` or `Detector.follow`, in the picture's size.
        metadata: Detectron2's, for class names; "class 3" without.

    Returns:
        (H', W', 3) uint8, RGB.
    """
    longest = max(image.shape[:2])
    image = resized(image, min(max(longest, PANEL[0]), PANEL[1]) / longest)
    colors = [color(index) for index in range(len(stages[-1]))]
    panels, titles = [], []
    for number, instances in enumerate(stages, start=1):
        texts = labels(instances, metadata) if number == len(stages) else None
        instances = rescaled(instances, image.shape[:2])
        panels.append(draw_boxes(image, instances, colors, texts, metadata))
        titles.append(f"stage {number}")
    if not colors:
        titles[-1] += ": nothing found"
    return contact_sheet(panels, len(panels), titles)
