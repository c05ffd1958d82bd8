"""The set loss of DETR with deep supervision: each stage has its own matching and losses.

Stages with the same number of queries are computed in one batch. All terms that do not depend on
the matching are launched while the assignment is solved. The host waits for the device only once,
for the costs.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from ..runtime.transfers import to_device
from ..structures import Prediction
from .costs import SetCosts
from .matcher import HungarianMatcher
from .true_boxes import noised_box_losses, true_class_losses

__all__ = ["SetCriterion", "Target"]

# labels (T,) int64 and boxes (T, 4) cx, cy, w, h, normalised, of one image
Target = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Group:
    """Stages with the same Q, computed together.

    Args:
        suffixes: suffix of the loss names of each stage.
        logits: (S, B, Q, K) float32.
        boxes: (S, B, Q, 4) float32.
        labels: (T,) target class of each object.
    """

    suffixes: list[str]
    logits: Tensor
    boxes: Tensor
    labels: Tensor


class SetCriterion(nn.Module):
    """Class, L1 and GIoU losses of matched predictions, of true boxes and of noised copies of them.

    Each sum is divided by the mean number of objects per process; that of the softmax class loss of
    the queries by the mean sum of the class weights. The gradient averaged by
    DistributedDataParallel then equals the gradient of one process with the whole batch.

    Args:
        costs: types and weights of the losses.
        matcher: assigns predictions to objects.
    """

    def __init__(self, costs: SetCosts, matcher: HungarianMatcher) -> None:
        super().__init__()
        self.costs = costs
        self.matcher = matcher

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SetCriterion":
        """Build from `MODEL.SET_DETECTOR`; matching costs and losses share their weights."""
        costs = SetCosts.from_config(cfg)
        return cls(costs, HungarianMatcher(costs))

    def forward(self, predictions: list[Prediction], targets: list[Target]) -> dict[str, Tensor]:
        """Return the weighted losses of every stage.

        Args:
            predictions: one per stage. The target class of all objects is 0 for proposals of a
                two-stage decoder.
            targets: one per image.

        Returns:
            `loss_class`, `loss_l1` and `loss_giou` of the last stage; the same names with the
            suffix `_0`, `_1`, … for the earlier stages and `_proposals` for proposals. Stages that
            classify the true boxes have a `loss_true_class` too; those that refine noised copies,
            `loss_noised_l1` and `loss_noised_giou`. A prediction that is not finite gives losses
            that are not finite, and no error.
        """
        counts = [len(labels) for labels, _ in targets]
        labels = torch.cat([labels for labels, _ in targets])
        boxes = torch.cat([boxes for _, boxes in targets]).float()
        groups = list(_groups(predictions, labels))
        searches = [self.matcher(g.logits, g.boxes, g.labels, boxes, counts) for g in groups]
        totals = self._normalizers(groups, counts)
        prepared = [self._prepare(group) for group in groups]
        found = self._true_box_losses(predictions, labels, boxes, counts, totals[0])
        for group, search, total, parts in zip(groups, searches, totals[1:], prepared, strict=True):
            rows, matched = search.wait()  # (S, M)
            found |= self._losses(group, parts, rows, boxes[matched], matched, totals[0], total)
        return {name: found[name] for name in _names(predictions)}

    def _prepare(self, group: _Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the terms that do not depend on the matching.

        Returns:
            Entries and negatives of the class loss; and two zeros (S,), which are NaN if any logit
            or box is not finite, because unmatched boxes contribute to no other term.
        """
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
        """Return the losses of a group by name.

        Args:
            group: stages with the same Q.
            parts: result of `_prepare` for the group.
            rows: (S, M), see `PendingAssignment.wait`.
            boxes: (S, M, 4), boxes of the matched objects.
            matched: (S, M), indices of the matched objects.
            objects: divisor of the box losses.
            class_total: divisor of the class loss.
        """
        entries, negatives, logits_zero, boxes_zero = parts
        l1, giou_loss, ious = self.costs.box_losses(group.boxes.flatten(0, 2)[rows], boxes)
        classes = self.costs.class_loss.total(
            entries, negatives, rows, group.labels[matched], ious.detach()
        )
        weighted = {
            "class": self.costs.class_weight / class_total * (classes + logits_zero),
            "l1": self.costs.l1_weight / objects * (l1.sum(dim=1) + boxes_zero),
            "giou": self.costs.giou_weight / objects * giou_loss.sum(dim=1),
        }
        return _by_stage(weighted, group.suffixes)

    def _true_box_losses(
        self,
        predictions: list[Prediction],
        labels: Tensor,
        boxes: Tensor,
        counts: list[int],
        objects: float | Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses by name of the stages with true boxes, or with noised copies of them.

        Args:
            predictions: see `forward`.
            labels: (T,), classes of the objects of all images.
            boxes: (T, 4), boxes of these objects.
            counts: number of objects of each image.
            objects: divisor of the losses.
        """
        named = list(zip(_suffixes(predictions), predictions, strict=True))
        classified = {s: p.true_logits for s, p in named if p.true_logits is not None}
        refined = {s: p for s, p in named if p.noised_boxes is not None}
        found = {}
        if classified:
            logits = torch.stack(list(classified.values()))
            classes = true_class_losses(self.costs, logits, labels, counts)
            weighted = {"true_class": self.costs.class_weight / objects * classes}
            found |= _by_stage(weighted, classified)
        if refined:
            noised = torch.stack([p.noised_boxes for p in refined.values()])
            copied = torch.stack([p.noised_objects for p in refined.values()])
            l1, giou_loss = noised_box_losses(self.costs, noised, copied, boxes, counts)
            weighted = {
                "noised_l1": self.costs.l1_weight / objects * l1,
                "noised_giou": self.costs.giou_weight / objects * giou_loss,
            }
            found |= _by_stage(weighted, refined)
        return found

    def _normalizers(self, groups: list[_Group], counts: list[int]) -> list[float] | list[Tensor]:
        """Return the divisors of the box losses and of the class loss of each group.

        They do not depend on the matching: every image matches min(Q, T_b) queries.
        """
        objects = sum(counts)
        totals = [float(objects)]
        for group in groups:
            images, queries = group.logits.shape[1:3]
            matched = sum(min(count, queries) for count in counts)
            totals.append(self.costs.class_loss.normalizer(objects, matched, images * queries))
        if comm.get_world_size() == 1:  # floats cost the device nothing
            return [max(total, 1.0) for total in totals]
        device = groups[0].logits.device
        return list(_mean_over_processes(to_device(torch.tensor(totals), device)).unbind())


def _mean_over_processes(totals: Tensor) -> Tensor:
    """Return max(sum over all processes, 1) / number of processes, for each total.

    All processes must call this function. The maximum avoids a division by 0.
    """
    torch.distributed.all_reduce(totals)
    return totals.clamp(min=1) / comm.get_world_size()


def _by_stage(losses: dict[str, Tensor], suffixes: Collection[str]) -> dict[str, Tensor]:
    """Return the losses (S,) of S stages as scalars, named "loss_", name and suffix."""
    return {
        f"loss_{name}{suffix}": loss
        for name, values in losses.items()
        for suffix, loss in zip(suffixes, values.unbind(), strict=True)
    }


def _suffixes(predictions: list[Prediction]) -> list[str]:
    """Return the suffix of each prediction: "_proposals", the stage index, or "" for the last."""
    stages = sum(not p.is_proposal for p in predictions)
    numbers = iter([f"_{stage}" for stage in range(stages - 1)] + [""])
    return ["_proposals" if p.is_proposal else next(numbers) for p in predictions]


def _names(predictions: list[Prediction]) -> list[str]:
    names = []
    for suffix, prediction in zip(_suffixes(predictions), predictions, strict=True):
        terms = ["class", "l1", "giou"] + ["true_class"] * (prediction.true_logits is not None)
        terms += ["noised_l1", "noised_giou"] * (prediction.noised_boxes is not None)
        names += [f"loss_{term}{suffix}" for term in terms]
    return names


def _groups(predictions: list[Prediction], labels: Tensor) -> Iterator[_Group]:
    """Group the matched stages by Q; proposals form groups of their own."""
    together: dict[tuple[bool, int], list[tuple[str, Prediction]]] = {}
    for suffix, prediction in zip(_suffixes(predictions), predictions, strict=True):
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
