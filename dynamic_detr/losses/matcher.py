"""Bipartite matching of predictions and objects (End-to-End Object Detection with Transformers,
equation 1), for all stages and images at once."""

import torch
from torch import Tensor, nn

from ..structures import box_cxcywh_to_xyxy
from ..transfers import to_device
from .assignment import PendingAssignment
from .boxes import generalized_iou
from .focal import focal_no, focal_yes

__all__ = ["HungarianMatcher"]

BAD_COST = 1e6  # of a pair whose cost is not a number: matched last


class HungarianMatcher(nn.Module):
    """Finds the pairs of least cost.

    The cost of a pair is class_weight · class + l1_weight · L1 + giou_weight · (-GIoU). The class
    cost of sigmoid logits is the focal loss that labelling the prediction would add; of softmax
    logits, minus the probability.

    Args:
        class_weight, l1_weight, giou_weight: weights of the three costs.
        class_head: "focal" or "softmax".
        l1_format: "cxcywh" or "xyxy", the coordinates, both normalised, that L1 is taken of.
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_head: str = "focal",
        l1_format: str = "cxcywh",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_head = class_head
        self.l1_format = l1_format
        self.alpha = alpha
        self.gamma = gamma

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
        return PendingAssignment(self.costs(logits, pred_boxes, labels, boxes, counts), counts)

    @torch.no_grad()
    def costs(
        self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, counts: list[int]
    ) -> Tensor:
        """(T, S, Q) float32, finite: what it costs that a query of its own image answers for an
        object. Arguments as in `forward`."""
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        image = to_device(image, logits.device)
        # each object beside the predictions for its own image: nothing is computed for padding
        pred_boxes = pred_boxes.float().transpose(0, 1)[image]  # (T, S, Q, 4)
        boxes = boxes.float()[:, None, None]
        corners, pred_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(pred_boxes)
        if self.l1_format == "xyxy":
            l1 = (pred_corners - corners).abs().sum(dim=-1)
        else:
            l1 = (pred_boxes - boxes).abs().sum(dim=-1)
        cost = (
            self.class_weight * self._class_cost(logits.float(), image, labels)
            + self.l1_weight * l1
            - self.giou_weight * generalized_iou(pred_corners, corners)
        )
        return torch.nan_to_num(cost, nan=BAD_COST, posinf=BAD_COST, neginf=BAD_COST)

    def _class_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """(T, S, Q) from (S, B, Q, K)."""
        if self.class_head == "softmax":
            return -logits.softmax(dim=-1).transpose(0, 1)[image, :, :, labels]
        logits = logits.transpose(0, 1)[image, :, :, labels]
        return focal_yes(logits, self.alpha, self.gamma) - focal_no(logits, self.alpha, self.gamma)
