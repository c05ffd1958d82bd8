"""Boxes of the same queries at every decoder stage, side by side: Figure 4 of the paper.

The scores of the last stage select the queries. Each query has one colour in all stages.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_convert

from ..layers import class_scores
from ..structures import Prediction
from .draw import color, draw_boxes, labels, rescaled, resized
from .sheet import contact_sheet

__all__ = ["draw_stages", "follow_queries"]

PANEL = (384, 640)  # smallest and largest longer side of each stage's image, pixels
MAX_QUERIES = 20  # more boxes hide each other


def follow_queries(
    predictions: Sequence[Prediction],
    image_size: tuple[int, int],
    class_head: str,
    threshold: float = 0.5,
    limit: int = MAX_QUERIES,
    nms_threshold: float = 1.0,
    wanted: Collection[int] | None = None,
) -> list[Instances]:
    """Return the same queries at every stage, selected by their score at the last stage.

    Args:
        predictions: one per stage, for one image (B = 1).
        image_size: (height, width) of the image in pixels.
        class_head: "focal" (K sigmoids) or "softmax" (K classes and "no object").
        threshold: minimum score at the last stage.
        limit: largest number of queries.
        nms_threshold: IoU at the last stage above which the lower-scoring of two queries of the
            same class is left out; 1 for no non-maximum suppression.
        wanted: indices of the classes at the last stage; None for all.

    Returns:
        N instances per stage, in the order of their scores at the last stage, with queries
        (indices), pred_boxes (x0, y0, x1, y1 in pixels), and the stage's scores and pred_classes.
    """
    stages, finite = [], True
    for prediction in predictions:
        if prediction.is_proposal:  # made before the queries
            continue
        logits = prediction.pred_logits[0].float()  # (Q, K)
        scores = class_scores(logits, class_head)
        best, classes = scores.max(dim=-1)  # (Q,)
        boxes = prediction.pred_boxes[0].float().cpu()
        stages.append((best.cpu(), classes.cpu(), boxes))
        finite = finite & boxes.isfinite().all(dim=-1)
    final = stages[-1][0].masked_fill(~finite, -1)
    queries = final.argsort(descending=True)
    queries = queries[final[queries] >= threshold]
    if nms_threshold < 1:
        _, classes, boxes = stages[-1]
        corners = box_convert(boxes[queries], "cxcywh", "xyxy")
        kept = batched_nms(corners, final[queries], classes[queries], nms_threshold)
        queries = queries[kept]
    if wanted is not None:
        queries = queries[[k in wanted for k in stages[-1][1][queries].tolist()]]
    queries = queries[:limit]
    height, width = image_size
    size = torch.tensor([width, height, width, height])
    followed = []
    for scores, classes, boxes in stages:
        corners = Boxes(box_convert(boxes[queries], "cxcywh", "xyxy") * size)
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
    """Draw the boxes of every stage in one row, with labels at the last stage.

    Args:
        image: (H, W, 3) uint8, RGB.
        stages: result of `follow_queries`, in pixels of the image.
        metadata: Detectron2's, for class names.

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
