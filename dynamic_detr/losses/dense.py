"""Losses of a dense head with task-aligned assignment (TOOD, arXiv 2108.07755).

Each object is assigned to the positions inside it with the best alignment, score · IoU⁶. The target
score of a position increases with its alignment, so the head learns to rank its boxes by quality.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from ..structures import Prediction, box_cxcywh_to_xyxy
from .costs import SetCosts
from .normalizer import mean_over_processes

__all__ = ["assign_positions", "dense_losses"]

POSITIONS = 13  # largest number per object
IOU_POWER = 6  # exponent of the IoU in the alignment
LEAST_IOU = 1e-4  # lower bound of the IoU in the alignment, so that every object gets positions
FOCAL_GAMMA = 2  # exponent of the quality focal loss


@torch.no_grad()
def assign_positions(
    scores: Tensor, boxes: Tensor, cells: Tensor, labels: Tensor, objects: Tensor
) -> tuple[Tensor, Tensor]:
    """Assign the objects of one image to positions.

    Args:
        scores: (N, K) probabilities; 0 in the padding.
        boxes: (N, 4) predicted boxes cx, cy, w, h, normalised.
        cells: (N, 4) cells of the positions, see `Prediction`.
        labels: (T,) int64, classes of the objects; T > 0.
        objects: (T, 4) cx, cy, w, h, normalised.

    Returns:
        owner: (N,) int64, the object of each position.
        target: (N,) target score in [0, 1] of the object's class; 0 for positions without object.
        It is proportional to the alignment, and the largest one of an object is the largest IoU of
        its positions.
    """
    iou = box_iou(box_cxcywh_to_xyxy(objects), box_cxcywh_to_xyxy(boxes))  # (T, N)
    distance = (objects[:, None, :2] - cells[..., :2]).abs()
    # an object smaller than a cell may contain no cell centre, but its centre is inside a cell
    inside = (distance <= torch.maximum(objects[:, None, 2:], cells[..., 2:]) / 2).all(dim=-1)
    alignment = scores[:, labels].T * iou.clamp(min=LEAST_IOU) ** IOU_POWER * inside
    best = alignment.topk(min(POSITIONS, alignment.shape[1]), dim=1).indices
    assigned = torch.zeros_like(inside).scatter(1, best, True) & (alignment > 0)
    # a position of several objects is assigned to the one with the largest IoU
    owner = iou.masked_fill(~assigned, -1).argmax(dim=0)
    assigned &= owner == torch.arange(len(labels), device=owner.device)[:, None]
    alignment, iou = alignment * assigned, iou * assigned
    largest = alignment.amax(dim=1, keepdim=True).clamp(min=torch.finfo(alignment.dtype).tiny)
    target = alignment / largest * iou.amax(dim=1, keepdim=True)
    return owner, target.sum(dim=0)


def dense_losses(
    prediction: Prediction, targets: list[tuple[Tensor, Tensor]], costs: SetCosts
) -> dict[str, Tensor]:
    """Return the weighted losses of one dense prediction.

    The class loss is the quality focal loss (arXiv 2006.04388). The box losses are weighted by the
    target scores. All sums are divided by the mean sum of the target scores per process.

    Args:
        prediction: prediction with cells.
        targets: labels (T,) int64 and boxes (T, 4) cx, cy, w, h, normalised, of each image.
        costs: weights of the losses and format of the L1 loss.

    Returns:
        The losses "class", "l1" and "giou".
    """
    logits, boxes = prediction.pred_logits.float(), prediction.pred_boxes.float()
    target_scores, target_boxes = torch.zeros_like(logits), boxes.detach().clone()
    scores, cells = logits.detach().sigmoid(), prediction.cells.float()
    for image, (labels, objects) in enumerate(targets):
        if len(labels):
            inputs = boxes[image].detach(), cells[image], labels, objects.float()
            owner, quality = assign_positions(scores[image], *inputs)
            target_scores[image].scatter_(1, labels[owner][:, None], quality[:, None])
            target_boxes[image] = objects.float()[owner]
    weight = target_scores.sum(dim=-1)
    entropy = F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none")
    classes = (target_scores - logits.sigmoid()).abs() ** FOCAL_GAMMA * entropy
    l1, giou_loss = costs.box_losses(boxes, target_boxes)
    total = mean_over_processes(weight.sum())
    return {
        "class": costs.class_weight * classes.sum() / total,
        "l1": costs.l1_weight * (l1 * weight).sum() / total,
        "giou": costs.giou_weight * (giou_loss * weight).sum() / total,
    }
