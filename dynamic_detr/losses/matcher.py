"""Bipartite matching of predictions and objects (End-to-End Object Detection with Transformers,
equation 1), for all stages and images at once."""

import torch
from torch import Tensor, nn

from ..transfers import to_device
from .assignment import PendingAssignment
from .costs import SetCosts

__all__ = ["HungarianMatcher"]

BAD_COST = 1e6  # of a pair whose cost is not a number: matched last


class HungarianMatcher(nn.Module):
    """Finds the pairs of least cost.

    Args:
        costs: the cost of a pair is the weighted sum of its class cost, L1 and 1 - GIoU. The class
            cost of sigmoid logits is the focal loss that the match would add; of softmax logits,
            minus the probability.
    """

    def __init__(self, costs: SetCosts) -> None:
        super().__init__()
        self.costs = costs

    def forward(
        self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> PendingAssignment:
        """Starts to match every stage and image on its own.

        Args:
            logits: (S, B, Q, K) of all stages.
            pred_boxes: (S, B, Q, 4) cx, cy, w, h, normalised.
            labels: (T,) int64, classes of the objects of all images, image by image.
            boxes: (T, 4) of the objects, as the predicted ones.
            counts: the number of objects of each image.

        Returns:
            The search; its `wait` gives min(T_b, Q) pairs for each stage and image of T_b objects.
        """
        return PendingAssignment(self.pair_costs(logits, pred_boxes, labels, boxes, counts), counts)

    @torch.no_grad()
    def pair_costs(
        self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> Tensor:
        """(T, S, Q) float32, finite: the cost of matching an object to each query of its own
        image. Arguments as in `forward`."""
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        image = to_device(image, logits.device)
        # each object beside the predictions for its own image: nothing is computed for padding
        pred_boxes = pred_boxes.float().transpose(0, 1)[image]  # (T, S, Q, 4)
        l1, giou_loss = self.costs.box_losses(pred_boxes, boxes.float()[:, None, None])
        cost = (
            self.costs.class_weight * self._class_cost(logits.float(), image, labels)
            + self.costs.l1_weight * l1
            + self.costs.giou_weight * giou_loss
        )
        return torch.nan_to_num(cost, nan=BAD_COST, posinf=BAD_COST, neginf=BAD_COST)

    def _class_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """(T, S, Q) from (S, B, Q, K)."""
        return self.costs.class_loss.cost(logits).transpose(0, 1)[image, :, :, labels]
