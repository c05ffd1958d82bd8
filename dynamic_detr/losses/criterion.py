"""The set loss of DETR with deep supervision: every stage is matched and pays on its own."""

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..structures import Prediction, box_cxcywh_to_xyxy
from .boxes import generalized_iou
from .matcher import HungarianMatcher

__all__ = ["SetCriterion", "Target"]

# labels (T,) int64 and boxes (T, 4) cx, cy, w, h, normalised, of the objects of one image
Target = tuple[Tensor, Tensor]


class SetCriterion(nn.Module):
    """Class, L1 and GIoU losses of matched predictions.

    Sums are divided by the number of objects over all processes (the softmax class loss: by the
    sum of the class weights), so that the gradient that DistributedDataParallel averages is that
    of one process with the whole batch.

    Args:
        num_classes: K.
        matcher: pairs predictions and objects.
        class_weight, l1_weight, giou_weight: weights of the losses.
        class_head: "focal" or "softmax".
        no_object_weight: weight of the "no object" class with softmax.
        l1_format: "cxcywh" or "xyxy".
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_head: str = "focal",
        no_object_weight: float = 0.1,
        l1_format: str = "cxcywh",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_head = class_head
        self.l1_format = l1_format
        self.alpha = alpha
        self.gamma = gamma
        weights = torch.ones(num_classes + 1)
        weights[-1] = no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, predictions: list[Prediction], targets: list[Target]) -> dict[str, Tensor]:
        """Weighted losses of every stage.

        Args:
            predictions: one per stage.
            targets: one per image.

        Returns:
            `loss_class`, `loss_l1`, `loss_giou` of the last stage; with the suffix `_0`, `_1`, …
            those of the stages before it. A prediction that is not finite makes its losses not
            finite; nothing is raised.
        """
        labels = [label for label, _ in targets]
        boxes = [box.float() for _, box in targets]
        matches = self.matcher(predictions, labels, boxes)
        objects = torch.tensor(
            float(sum(map(len, labels))), device=predictions[0].pred_boxes.device
        )
        normalizer = _mean_over_processes(objects)
        losses = {}
        for stage, (prediction, pairs) in enumerate(zip(predictions, matches, strict=True)):
            suffix = "" if stage == len(predictions) - 1 else f"_{stage}"
            stage_losses = self._stage(prediction, pairs, labels, boxes, normalizer)
            losses.update({f"loss_{name}{suffix}": loss for name, loss in stage_losses.items()})
        return losses

    def _stage(
        self,
        prediction: Prediction,
        pairs: list[tuple[Tensor, Tensor]],
        labels: list[Tensor],
        boxes: list[Tensor],
        normalizer: Tensor,
    ) -> dict[str, Tensor]:
        device = prediction.pred_boxes.device
        image = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        matched_labels = torch.cat([label[i] for label, (_, i) in zip(labels, pairs, strict=True)])
        matched_boxes = torch.cat([box[i] for box, (_, i) in zip(boxes, pairs, strict=True)])

        logits = prediction.pred_logits.float()
        classes = torch.full(logits.shape[:2], self.num_classes, device=device)
        classes[image, query] = matched_labels

        pred_boxes = prediction.pred_boxes.float()[image, query]
        corners, pred_corners = box_cxcywh_to_xyxy(matched_boxes), box_cxcywh_to_xyxy(pred_boxes)
        if self.l1_format == "xyxy":
            l1 = F.l1_loss(pred_corners, corners, reduction="sum")
        else:
            l1 = F.l1_loss(pred_boxes, matched_boxes, reduction="sum")
        # boxes that no object was matched to count as nothing, unless they are not finite
        l1 = l1 + 0 * prediction.pred_boxes.sum()
        giou = (1 - generalized_iou(pred_corners, corners)).sum()
        return {
            "class": self.class_weight * self._class_loss(logits, classes, normalizer),
            "l1": self.l1_weight * l1 / normalizer,
            "giou": self.giou_weight * giou / normalizer,
        }

    def _class_loss(self, logits: Tensor, classes: Tensor, normalizer: Tensor) -> Tensor:
        if self.class_head == "softmax":
            total = F.cross_entropy(
                logits.flatten(0, 1), classes.flatten(), self.class_weights, reduction="sum"
            )
            return total / _mean_over_processes(self.class_weights[classes].sum())
        wanted = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, reduction="sum")
        return loss / normalizer


def _mean_over_processes(total: Tensor) -> Tensor:
    """max(sum over all processes, 1) / number of processes, so that no process divides by 0."""
    if comm.get_world_size() > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return total.clamp(min=1) / comm.get_world_size()
