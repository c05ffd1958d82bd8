"""Generalised IoU that no box can trip."""

import torch
from torch import Tensor

__all__ = ["generalized_iou"]


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised intersection over union, with broadcasting.

    Boxes without area, inverted or far outside give numbers in [-1, 1]; boxes that are not finite
    give NaN. Nothing is asserted, so that a diverging run can be stopped in an orderly way.

    Args:
        boxes, others: (..., 4) corners, broadcastable to each other.

    Returns:
        (...) in [-1, 1].
    """
    tiny = torch.finfo(boxes.dtype).tiny
    low, high = boxes[..., :2], torch.maximum(boxes[..., :2], boxes[..., 2:])
    other_low, other_high = others[..., :2], torch.maximum(others[..., :2], others[..., 2:])
    area = (high - low).prod(dim=-1)
    other_area = (other_high - other_low).prod(dim=-1)
    overlap = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    intersection = overlap.clamp(min=0).prod(dim=-1)
    union = area + other_area - intersection
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=-1)
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
