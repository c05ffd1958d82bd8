"""Reference of the matcher: pair costs in Python, and the cheapest of all matchings."""

import itertools
import math

import numpy as np


def corners(box) -> tuple[float, float, float, float]:
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def giou(box, other) -> float:
    """Return the generalised IoU of two boxes cx, cy, w, h."""
    ax1, ay1, ax2, ay2 = corners(box)
    bx1, by1, bx2, by2 = corners(other)
    overlap_x = max(0.0, min(ax2, bx2) - max(ax1, bx1))
    overlap_y = max(0.0, min(ay2, by2) - max(ay1, by1))
    intersection = overlap_x * overlap_y
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return intersection / union - (hull - union) / hull


def l1(box, other, box_format: str) -> float:
    if box_format == "xyxy":
        box, other = corners(box), corners(other)
    return sum(abs(a - b) for a, b in zip(box, other, strict=True))


def focal(logit: float, is_object: bool, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """Return -α_t · (1 - p_t)^γ · log p_t."""
    p = 1 / (1 + math.exp(-logit))
    p_t, alpha_t = (p, alpha) if is_object else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


def class_cost(logits, label: int, class_head: str) -> float:
    if class_head == "softmax":
        exponentials = [math.exp(value) for value in logits]
        return -exponentials[label] / sum(exponentials)
    return focal(logits[label], True) - focal(logits[label], False)


def cost_matrix(logits, boxes, labels, objects, class_head: str, box_format: str) -> np.ndarray:
    """Return the costs 2 · class + 5 · L1 - 2 · GIoU, (Q, T)."""
    cost = np.empty((len(boxes), len(objects)))
    for i, (scores, box) in enumerate(zip(logits, boxes, strict=True)):
        for j, (label, wanted) in enumerate(zip(labels, objects, strict=True)):
            cost[i, j] = (
                2 * class_cost(scores, label, class_head)
                + 5 * l1(box, wanted, box_format)
                - 2 * giou(box, wanted)
            )
    return cost


def cheapest_pairs(cost: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of the cheapest matching of min(Q, T) rows and columns."""
    rows, columns = cost.shape
    if rows < columns:
        return sorted((i, j) for j, i in cheapest_pairs(cost.T))
    ways = itertools.permutations(range(rows), columns)
    best = min(ways, key=lambda way: sum(cost[i, j] for j, i in enumerate(way)))
    return sorted((i, j) for j, i in enumerate(best))
