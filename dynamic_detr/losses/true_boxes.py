"""Losses of the true boxes and of their noised copies, whose objects are known without matching.

The functions return one sum over the objects per stage, (S,), without the weights of the losses.
"""

import torch
from torch import Tensor

from ..runtime.transfers import to_device
from ..structures import copied_objects
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
    rows = _rows(counts, size, logits.device)
    entries = costs.class_loss.entries(logits.float().flatten(1, 2)[:, None, rows])
    return costs.class_loss.total(
        entries,
        costs.class_loss.negatives(entries),
        torch.arange(stages * len(rows), device=logits.device).view(stages, -1),
        labels.expand(stages, -1),
        None,
    )


def noised_box_losses(
    costs: SetCosts, noised: Tensor, boxes: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the L1 and GIoU losses of the noised boxes, for each object the mean of its copies.

    More exactly, each copy has the weight T_b / N, the inverse of the mean number of copies.

    Args:
        costs: types of the losses.
        noised: (S, B, N, 4), the `noised_boxes` of S predictions.
        boxes: (T, 4) cx, cy, w, h of the objects of all images, normalised.
        counts: number of objects T_b of each image.
    """
    batch, copies = noised.shape[1:3]
    number = torch.tensor(counts)[:, None].expand(-1, copies)
    first = number.cumsum(0) - number
    rows = torch.arange(batch * copies).view(batch, copies)
    index = torch.stack([rows, first + copied_objects(counts, copies), number])[:, number > 0]
    rows, objects, number = to_device(index, noised.device)
    l1, giou_loss, _ = costs.box_losses(noised.float().flatten(1, 2)[:, rows], boxes[objects])
    weights = number / copies
    return (l1 * weights).sum(dim=1), (giou_loss * weights).sum(dim=1)


def _rows(counts: list[int], size: int, device: torch.device) -> Tensor:
    """Return the rows (T,) of the objects in a table with `size` rows for each image."""
    rows = [image * size + place for image, n in enumerate(counts) for place in range(n)]
    return to_device(torch.tensor(rows, dtype=torch.int64), device)
