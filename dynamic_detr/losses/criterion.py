"""The set loss of DETR with deep supervision: every stage is matched and pays on its own.

All stages and images are computed together. What does not depend on the matching is given to the
device while the assignment is solved; the host waits for the device once, for the costs.
"""

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..structures import Prediction, box_cxcywh_to_xyxy
from ..transfers import to_device
from .boxes import generalized_iou
from .focal import focal_no, focal_yes
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
        matcher: pairs predictions and objects.
        class_weight, l1_weight, giou_weight: weights of the losses.
        class_head: "focal" or "softmax".
        no_object_weight: weight of the "no object" class with softmax.
        l1_format: "cxcywh" or "xyxy".
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
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
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_head = class_head
        self.no_object_weight = no_object_weight
        self.l1_format = l1_format
        self.alpha = alpha
        self.gamma = gamma

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
        logits = torch.stack([p.pred_logits for p in predictions]).float()  # (S, B, Q, K)
        pred_boxes = torch.stack([p.pred_boxes for p in predictions]).float()  # (S, B, Q, 4)
        counts = [len(labels) for labels, _ in targets]
        labels = torch.cat([labels for labels, _ in targets])
        boxes = torch.cat([boxes for _, boxes in targets]).float()
        search = self.matcher(logits, pred_boxes, labels, boxes, counts)

        # none of this needs the matches
        objects, class_total = self._normalizers(logits.shape[1:3], counts, logits.device)
        entries = self._class_entries(logits)
        class_no = self._cost_of_no(entries)
        # predictions that no object was matched to count as nothing, unless they are not finite
        logits_trace = 0 * logits.sum(dim=(1, 2, 3))
        boxes_trace = 0 * pred_boxes.sum(dim=(1, 2, 3))

        rows, matched = search.wait()
        labels, boxes = labels[matched], boxes[matched]  # (S, M), (S, M, 4)
        pred_boxes = pred_boxes.flatten(0, 2)[rows]
        corners, pred_corners = box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(pred_boxes)
        if self.l1_format == "xyxy":
            l1 = (pred_corners - corners).abs()
        else:
            l1 = (pred_boxes - boxes).abs()
        sums = {
            "class": (
                self.class_weight / class_total,
                self._class_sum(entries, class_no, rows, labels) + logits_trace,
            ),
            "l1": (self.l1_weight / objects, l1.sum(dim=(1, 2)) + boxes_trace),
            "giou": (
                self.giou_weight / objects,
                (1 - generalized_iou(pred_corners, corners)).sum(dim=1),
            ),
        }
        losses = {name: (weight * total).unbind() for name, (weight, total) in sums.items()}
        last = len(predictions) - 1
        return {
            f"loss_{name}" + ("" if stage == last else f"_{stage}"): losses[name][stage]
            for stage in range(len(predictions))
            for name in losses
        }

    def _normalizers(
        self, shape: tuple[int, int], counts: list[int], device: torch.device
    ) -> list[float] | list[Tensor]:
        """What box losses and class loss are divided by.

        Both are known before the matching: every image pairs min(Q, T_b) queries.
        """
        batch, queries = shape
        objects = class_total = float(sum(counts))
        if self.class_head == "softmax":
            paired = sum(min(count, queries) for count in counts)
            class_total = paired + self.no_object_weight * (batch * queries - paired)
        return _mean_over_processes([objects, class_total], device)

    def _class_entries(self, logits: Tensor) -> Tensor:
        """What the class loss looks at: sigmoid logits, or the logarithms of probabilities."""
        return logits.log_softmax(dim=-1) if self.class_head == "softmax" else logits

    def _cost_of_no(self, entries: Tensor) -> Tensor:
        """(S, B, Q, K) or, with softmax, (S, B, Q): the class loss if no query had an object."""
        if self.class_head == "softmax":
            return -self.no_object_weight * entries[..., -1]
        return focal_no(entries, self.alpha, self.gamma)

    def _class_sum(self, entries: Tensor, no: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """(S,): the class loss, with the matched entries paying for yes instead of no."""
        yes = entries.flatten(0, 2)[rows, labels]  # (S, M)
        if self.class_head == "softmax":
            place, yes = rows, -yes
        else:
            place = rows * entries.shape[-1] + labels
            yes = focal_yes(yes, self.alpha, self.gamma)
        return no.flatten().index_put((place,), yes).view_as(no).flatten(1).sum(dim=1)


def _mean_over_processes(totals: list[float], device: torch.device) -> list[float] | list[Tensor]:
    """For each total max(sum over all processes, 1) / number of processes, so that no process
    divides by 0."""
    world = comm.get_world_size()
    if world == 1:
        return [max(total, 1.0) for total in totals]
    sums = to_device(torch.tensor(totals), device)
    torch.distributed.all_reduce(sums)
    return list((sums.clamp(min=1) / world).unbind())
