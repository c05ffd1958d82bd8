"""Losses of a dense head, in which an object teaches several positions (TOOD, arXiv 2108.07755).

An object takes those positions within it whose score of its class and whose box fit it best
together, and wants of each a score that grows with this fit. So the head learns to rank its boxes
by their quality, without a matching.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from ..structures import Prediction, box_cxcywh_to_xyxy
from .costs import SetCosts
from .normalizer import mean_over_processes

__all__ = ["assign_positions", "dense_losses"]

POSITIONS = 13  # of an object
IOU_POWER = 6  # of the IoU in the fit, which is score · IoU ^ power
LEAST_IOU = 1e-4  # in the fit, so that an object has positions before its boxes overlap it
FOCAL_GAMMA = 2  # of the quality focal loss


@torch.no_grad()
def assign_positions(
    scores: Tensor, boxes: Tensor, cells: Tensor, labels: Tensor, objects: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives objects of one image to positions.

    Args:
        scores: (N, K), probabilities of the classes; 0 where there is no position.
        boxes: (N, 4) predicted ones, cx, cy, w, h; as all boxes here.
        cells: (N, 4), see `Prediction`.
        labels, objects: (T,) int64 and (T, 4), T > 0.

    Returns:
        For each position the index of its object, (N,) int64, and the score that is wanted of it,
        (N,) in [0, 1]: the best position of an object is to have the best IoU of its positions. A
        position without object has the score 0.
    """
    iou = box_iou(box_cxcywh_to_xyxy(objects), box_cxcywh_to_xyxy(boxes))  # (T, N)
    distance = (objects[:, None, :2] - cells[..., :2]).abs()
    # an object smaller than a cell may have no centre of a cell in it, but lies in a cell
    inside = (distance <= torch.maximum(objects[:, None, 2:], cells[..., 2:]) / 2).all(dim=-1)
    fit = scores[:, labels].T * iou.clamp(min=LEAST_IOU) ** IOU_POWER * inside
    best = fit.topk(min(POSITIONS, fit.shape[1]), dim=1).indices
    taken = torch.zeros_like(inside).scatter(1, best, True) & (fit > 0)
    # a position that several objects take goes to the one that its box overlaps most
    owner = iou.masked_fill(~taken, -1).argmax(dim=0)
    taken &= owner == torch.arange(len(labels), device=owner.device)[:, None]
    fit, iou = fit * taken, iou * taken
    tiny = torch.finfo(fit.dtype).tiny
    wanted = fit / fit.amax(dim=1, keepdim=True).clamp(min=tiny) * iou.amax(dim=1, keepdim=True)
    return owner, wanted.sum(dim=0)


def dense_losses(
    prediction: Prediction, targets: list[tuple[Tensor, Tensor]], costs: SetCosts
) -> dict[str, Tensor]:
    """Weighted losses of one dense prediction.

    The class loss is the quality focal loss (arXiv 2006.04388). Box losses are weighted by the
    wanted scores. All sums are divided by the sum of the wanted scores over all processes.

    Args:
        prediction: with cells.
        targets: labels (T,) and boxes (T, 4) of each image.
        costs: weights of the three losses and the format of L1.

    Returns:
        "class", "l1" and "giou".
    """
    logits, boxes = prediction.pred_logits.float(), prediction.pred_boxes.float()
    wanted, wanted_boxes = torch.zeros_like(logits), boxes.detach().clone()
    scores, cells = logits.detach().sigmoid(), prediction.cells.float()
    for image, (labels, objects) in enumerate(targets):
        if len(labels):
            found = boxes[image].detach(), cells[image], labels, objects.float()
            owner, quality = assign_positions(scores[image], *found)
            wanted[image].scatter_(1, labels[owner][:, None], quality[:, None])
            wanted_boxes[image] = objects.float()[owner]
    weight = wanted.sum(dim=-1)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    classes = (wanted - logits.sigmoid()).abs() ** FOCAL_GAMMA * entropy
    l1, giou_loss = costs.box_losses(boxes, wanted_boxes)
    total = mean_over_processes(weight.sum())
    return {
        "class": costs.class_weight * classes.sum() / total,
        "l1": costs.l1_weight * (l1 * weight).sum() / total,
        "giou": costs.giou_weight * (giou_loss * weight).sum() / total,
    }
