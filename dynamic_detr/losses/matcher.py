"""Bipartite matching of predictions and objects (End-to-End Object Detection with Transformers,
equation 1), for all stages at once."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..structures import Prediction, box_cxcywh_to_xyxy
from .boxes import generalized_iou

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

    @torch.no_grad()
    def forward(
        self, predictions: list[Prediction], labels: list[Tensor], boxes: list[Tensor]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Matches every stage and image on its own.

        Args:
            predictions: S stages.
            labels: for each image (T,) int64, classes of its T objects.
            boxes: for each image (T, 4) cx, cy, w, h, normalised.

        Returns:
            For each stage, for each image, (queries, objects): two int64 tensors on the device
            with min(Q, T) pairs, queries ascending.
        """
        logits = torch.stack([p.pred_logits for p in predictions]).float()  # (S, B, Q, K)
        pred_boxes = torch.stack([p.pred_boxes for p in predictions]).float()
        costs = [
            self._cost(logits[:, image], pred_boxes[:, image], labels[image], boxes[image])
            for image in range(logits.shape[1])
        ]
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()  # one transfer
        parts = flat.split([cost.numel() for cost in costs])
        costs = [part.view(c.shape).numpy() for part, c in zip(parts, costs, strict=True)]
        device = logits.device
        return [
            [
                tuple(torch.as_tensor(i, device=device) for i in linear_sum_assignment(cost[stage]))
                for cost in costs
            ]
            for stage in range(len(predictions))
        ]

    def _cost(self, logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """(S, Q, T) from (S, Q, K), (S, Q, 4), (T,) and (T, 4)."""
        corners, pred_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(pred_boxes)
        if self.l1_format == "xyxy":
            l1 = (pred_corners[:, :, None] - corners).abs().sum(dim=-1)
        else:
            l1 = (pred_boxes[:, :, None] - boxes).abs().sum(dim=-1)
        giou = generalized_iou(pred_corners[:, :, None], corners)
        cost = (
            self.class_weight * self._class_cost(logits, labels)
            + self.l1_weight * l1
            - self.giou_weight * giou
        )
        return torch.nan_to_num(cost, nan=BAD_COST, posinf=BAD_COST, neginf=BAD_COST)

    def _class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_head == "softmax":
            return -logits.softmax(dim=-1)[..., labels]
        logits = logits[..., labels]
        probability = logits.sigmoid()
        log_yes = F.logsigmoid(logits)
        log_no = F.logsigmoid(-logits)
        yes = -self.alpha * (1 - probability) ** self.gamma * log_yes
        no = -(1 - self.alpha) * probability**self.gamma * log_no
        return yes - no
