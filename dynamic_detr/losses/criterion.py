"""The set loss of DETR with deep supervision: every stage is matched and trained on its own.

Stages of equally many queries are computed together, with all images. What does not depend on the
matching is given to the device while the assignment is solved; the host waits for the device once,
for the costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from ..structures import Prediction
from ..transfers import to_device
from .costs import SetCosts
from .dense import dense_losses
from .matcher import HungarianMatcher
from .normalizer import mean_over_processes

__all__ = ["SetCriterion", "Target"]

# labels (T,) int64 and boxes (T, 4) cx, cy, w, h, normalised, of the objects of one image
Target = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Group:
    """Predictions of one Q, computed together.

    Args:
        suffixes: of the names of their losses.
        logits: (S, B, Q, K) float32.
        boxes: (S, B, Q, 4) float32.
        labels: (T,), the class that is wanted of a match, for each object.
    """

    suffixes: list[str]
    logits: Tensor
    boxes: Tensor
    labels: Tensor


class SetCriterion(nn.Module):
    """Class, L1 and GIoU losses of matched predictions.

    Sums are divided by the number of objects over all processes (the softmax class loss: by the
    sum of the class weights), so that the gradient that DistributedDataParallel averages is that
    of one process with the whole batch.

    Args:
        costs: kinds and weights of the losses.
        matcher: pairs predictions and objects.
    """

    def __init__(self, costs: SetCosts, matcher: HungarianMatcher) -> None:
        super().__init__()
        self.costs = costs
        self.matcher = matcher

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SetCriterion":
        """From `MODEL.SET_DETECTOR`; costs and losses share their weights."""
        costs = SetCosts.from_config(cfg)
        return cls(costs, HungarianMatcher(costs))

    def forward(self, predictions: list[Prediction], targets: list[Target]) -> dict[str, Tensor]:
        """Weighted losses of every stage.

        Args:
            predictions: one per stage. Proposals of a two-stage decoder are trained to tell
                objects, as class 0, from everything else; those with cells share objects, and are
                trained by `dense_losses`.
            targets: one per image.

        Returns:
            `loss_class`, `loss_l1`, `loss_giou` of the last stage; with the suffix `_0`, `_1`, …
            those of the stages before it, with `_proposals` those of proposals. A prediction that
            is not finite makes its losses not finite; nothing is raised.
        """
        counts = [len(labels) for labels, _ in targets]
        labels = torch.cat([labels for labels, _ in targets])
        boxes = torch.cat([boxes for _, boxes in targets]).float()
        groups = list(_groups(predictions, labels))
        searches = [self.matcher(g.logits, g.boxes, g.labels, boxes, counts) for g in groups]
        totals = self._normalizers(groups, counts)
        prepared = [self._prepare(group) for group in groups]
        found: dict[str, Tensor] = {}
        for prediction in predictions:
            if prediction.cells is not None:
                losses = dense_losses(prediction, targets, self.costs)
                found |= {f"loss_{name}_proposals": loss for name, loss in losses.items()}
        for group, search, total, parts in zip(groups, searches, totals[1:], prepared, strict=True):
            rows, matched = search.wait()  # (S, M)
            found |= self._losses(group, parts, rows, boxes[matched], matched, totals[0], total)
        return {name: found[name] for name in _names(predictions)}

    def _prepare(self, group: _Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What needs no matches: entries and negatives of the class loss, and two zeros (S,) that
        are not finite where a prediction is not, as those that are not matched have no other
        say in the losses of boxes."""
        entries = self.costs.class_loss.entries(group.logits)
        negatives = self.costs.class_loss.negatives(entries)
        return (
            entries,
            negatives,
            0 * group.logits.sum(dim=(1, 2, 3)),
            0 * group.boxes.sum(dim=(1, 2, 3)),
        )

    def _losses(
        self,
        group: _Group,
        parts: tuple[Tensor, Tensor, Tensor, Tensor],
        rows: Tensor,
        boxes: Tensor,
        matched: Tensor,
        objects: float | Tensor,
        class_total: float | Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a group, by name.

        Args:
            group, parts: and what `_prepare` made of it.
            rows, matched: (S, M), see `PendingAssignment.wait`.
            boxes: (S, M, 4) of the matched objects.
            objects, class_total: by which box losses and class losses are divided.
        """
        entries, negatives, logits_zero, boxes_zero = parts
        classes = self.costs.class_loss.total(entries, negatives, rows, group.labels[matched])
        l1, giou_loss = self.costs.box_losses(group.boxes.flatten(0, 2)[rows], boxes)
        weighted = {
            "class": self.costs.class_weight / class_total * (classes + logits_zero),
            "l1": self.costs.l1_weight / objects * (l1.sum(dim=1) + boxes_zero),
            "giou": self.costs.giou_weight / objects * giou_loss.sum(dim=1),
        }
        return {
            f"loss_{name}{suffix}": loss
            for name, losses in weighted.items()
            for suffix, loss in zip(group.suffixes, losses.unbind(), strict=True)
        }

    def _normalizers(self, groups: list[_Group], counts: list[int]) -> list[float] | list[Tensor]:
        """The numbers that box losses, and the class losses of each group, are divided by.

        They are known before the matching: every image pairs min(Q, T_b) queries.
        """
        objects = sum(counts)
        totals = [float(objects)]
        for group in groups:
            _, batch, queries, _ = group.logits.shape
            matched = sum(min(count, queries) for count in counts)
            totals.append(self.costs.class_loss.normalizer(objects, matched, batch * queries))
        if comm.get_world_size() == 1:  # floats cost the device nothing
            return [max(total, 1.0) for total in totals]
        device = groups[0].logits.device
        return list(mean_over_processes(to_device(torch.tensor(totals), device)).unbind())


def _suffixes(predictions: list[Prediction]) -> list[str]:
    """One for each prediction: none for the last, "_proposals", or the number of the stage."""
    stages = sum(not p.is_proposal for p in predictions)
    numbers = iter([f"_{stage}" for stage in range(stages - 1)] + [""])
    return ["_proposals" if p.is_proposal else next(numbers) for p in predictions]


def _names(predictions: list[Prediction]) -> list[str]:
    suffixes = _suffixes(predictions)
    return [f"loss_{name}{suffix}" for suffix in suffixes for name in ("class", "l1", "giou")]


def _groups(predictions: list[Prediction], labels: Tensor) -> Iterator[_Group]:
    """Predictions that are matched together: stages of one Q; proposals apart."""
    together: dict[tuple[bool, int], list[tuple[str, Prediction]]] = {}
    for suffix, prediction in zip(_suffixes(predictions), predictions, strict=True):
        if prediction.cells is None:
            key = prediction.is_proposal, prediction.pred_logits.shape[1]
            together.setdefault(key, []).append((suffix, prediction))
    for (is_proposal, _), members in together.items():
        suffixes, group = zip(*members, strict=True)
        yield _Group(
            list(suffixes),
            torch.stack([p.pred_logits for p in group]).float(),
            torch.stack([p.pred_boxes for p in group]).float(),
            torch.zeros_like(labels) if is_proposal else labels,
        )
