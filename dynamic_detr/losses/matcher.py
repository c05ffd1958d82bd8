"""Bipartite matching of predictions and ground truth (DETR, eq. 1), for all stages and images."""

import torch
from torch import Tensor, nn

from ..runtime.transfers import to_device
from .assignment import PendingAssignment
from .costs import SetCosts

__all__ = ["HungarianMatcher"]

BAD_COST = 1e6  # replaces costs that are not finite, so that these pairs are matched last


class HungarianMatcher(nn.Module):
    """Bipartite matching of predictions and ground-truth objects with the minimum total cost.

    The cost of a pair is the weighted sum of the class cost, the L1 distance of the boxes and
    1 - GIoU.

    Args:
        costs: terms and weights of the cost.
    """

    def __init__(self, costs: SetCosts) -> None:
        super().__init__()
        self.costs = costs

    def forward(
        self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> PendingAssignment:
        """Start the matching of every stage and image.

        Args:
            logits: (S, B, Q, K) class logits of S stages, B images, Q queries and K classes.
            pred_boxes: (S, B, Q, 4) cx, cy, w, h, normalised.
            labels: (T,) int64, classes of the T objects of all images, concatenated.
            boxes: (T, 4) cx, cy, w, h of the objects, normalised.
            counts: number of objects T_b of each image.

        Returns:
            The assignment in progress, min(T_b, Q) pairs for each stage and image.
        """
        return PendingAssignment(self.pair_costs(logits, pred_boxes, labels, boxes, counts), counts)

    @torch.no_grad()
    def pair_costs(
        self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> Tensor:
        """Return the cost of each object and each query of its image: (T, S, Q) float32, finite.

        See `forward` for the arguments.
        """
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        image = to_device(image, logits.device)
        # gather the predictions for each object, instead of padding objects to the largest count
        pred_boxes = pred_boxes.float().transpose(0, 1)[image]  # (T, S, Q, 4)
        l1, giou_loss, _ = self.costs.box_losses(pred_boxes, boxes.float()[:, None, None])
        cost = (
            self.costs.class_weight * self._class_cost(logits.float(), image, labels)
            + self.costs.l1_weight * l1
            + self.costs.giou_weight * giou_loss
        )
        return torch.nan_to_num(cost, nan=BAD_COST, posinf=BAD_COST, neginf=BAD_COST)

    def _class_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Return the unweighted class costs (T, S, Q) of logits (S, B, Q, K)."""
        return self.costs.class_loss.cost(logits).transpose(0, 1)[image, :, :, labels]
