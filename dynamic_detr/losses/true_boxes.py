"""Losses of the true boxes and of their noised copies, whose objects are known without matching.

The functions return one sum over the objects per stage, (S,), without the weights of the losses.
"""

import torch
from torch import Tensor

from ..runtime.transfers import to_device
from .costs import SetCosts

__all__ = ["noised_box_losses", "true_class_losses"]


def true_class_losses(costs: SetCosts, logits: Tensor, labels: Tensor, counts: list[int]) -> Tensor:
    """Return the class losses of the true boxes.

    Args:
        costs: types of the losses.
        logits: (S, B, T_max, K), the `true_logits` of S predictions.
        labels: (T,), classes of the objects of all images.
        counts: number of objects of each image.
    """
    stages, _, size = logits.shape[:3]
    rows = [image * size + place for image, n in enumerate(counts) for place in range(n)]
    rows = to_device(torch.tensor(rows, dtype=torch.int64), logits.device)
    entries = costs.class_loss.entries(logits.float().flatten(1, 2)[:, None, rows])
    return costs.class_loss.total(
        entries,
        costs.class_loss.negatives(entries),
        torch.arange(stages * len(rows), device=logits.device).view(stages, -1),
        labels.expand(stages, -1),
        None,
    )


def noised_box_losses(
    costs: SetCosts, noised: Tensor, objects: Tensor, boxes: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the L1 and GIoU losses of the noised boxes.

    Each copy has the weight T_b / N, so that an object counts once on average.

    Args:
        costs: types of the losses.
        noised: (S, B, N, 4), the `noised_boxes` of S predictions.
        objects: (S, B, N), their `noised_objects`.
        boxes: (T, 4) cx, cy, w, h of the objects of all images, normalised.
        counts: number of objects T_b of each image.
    """
    boxes = torch.cat([boxes, boxes.new_full((1, 4), 0.5)])  # object -1, with weight 0
    l1, giou_loss, _ = costs.box_losses(noised.float(), boxes[objects])
    weights = to_device(torch.tensor(counts), noised.device)[:, None] / noised.shape[2]
    return (l1 * weights).sum(dim=(1, 2)), (giou_loss * weights).sum(dim=(1, 2))
