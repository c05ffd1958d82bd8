"""IoU and generalised IoU for the matcher, the box loss and the varifocal loss.

The losses of torchvision and fvcore index with boolean masks, which synchronises with the GPU, and
fvcore's asserts ordered corners.
"""

import torch
from torch import Tensor

__all__ = ["iou_and_generalized_iou"]


def iou_and_generalized_iou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intersection over union of broadcastable boxes, plain and generalised.

    Empty and inverted boxes are valid input. Boxes that are not finite may give NaN and raise no
    error, so the trainer can stop a diverging run.

    Args:
        boxes: (..., 4) corners x1, y1, x2, y2.
        others: (..., 4) corners.

    Returns:
        (...) in [0, 1], and (...) in [-1, 1].
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
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)
