"""Class loss and class cost of sigmoid logits (focal losses) and softmax logits (cross-entropy).

The loss is computed in two parts. `negatives` treats every query as unmatched, so it does not
depend on the matching. `total` then replaces the terms of the matched queries.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .focal import focal_negative, focal_positive

__all__ = ["ClassLoss", "FocalClassLoss", "SoftmaxClassLoss", "VarifocalClassLoss"]


@dataclass(frozen=True)
class FocalClassLoss:
    """Focal loss of K independent sigmoid logits.

    Args:
        alpha: weight of positives, in [0, 1]; that of negatives is 1 - alpha.
        gamma: exponent.
    """

    alpha: float
    gamma: float

    def cost(self, logits: Tensor) -> Tensor:
        """Return the matching costs (..., K): the change of the focal loss if the query matches."""
        positive = focal_positive(logits, self.alpha, self.gamma)
        return positive - focal_negative(logits, self.alpha, self.gamma)

    def entries(self, logits: Tensor) -> Tensor:
        """Return the input of the other methods, (S, B, Q, K)."""
        return logits

    def negatives(self, entries: Tensor) -> Tensor:
        """Return the loss of each logit if no query matches, (S, B, Q, K)."""
        return focal_negative(entries, self.alpha, self.gamma)

    def positives(self, logits: Tensor, ious: Tensor | None) -> Tensor:
        """Return the loss of the logits of the true classes, in the shape of the logits.

        See `total` for the IoUs; this loss does not depend on them.
        """
        return focal_positive(logits, self.alpha, self.gamma)

    def total(
        self, entries: Tensor, negatives: Tensor, rows: Tensor, labels: Tensor, ious: Tensor | None
    ) -> Tensor:
        """Return the sums over images and queries, (S,).

        Args:
            entries: (S, B, Q, K), from `entries`.
            negatives: (S, B, Q, K), from `negatives`.
            rows: (S, M) int64, matched queries, see `PendingAssignment.wait`.
            labels: (S, M) int64, classes of the matched objects.
            ious: (S, M), IoU of the boxes of the matched queries and objects, without gradient;
                None if the boxes are those of the objects.
        """
        positives = self.positives(entries.flatten(0, 2)[rows, labels], ious)
        place = rows * entries.shape[-1] + labels
        return negatives.flatten().index_put((place,), positives).view_as(negatives).sum((1, 2, 3))

    def normalizer(self, objects: int, matched: int, queries: int) -> float:
        """Return the divisor of the sum on one process: the number of objects.

        Args:
            objects: number of objects in the batch.
            matched: number of matched queries, at most `objects`.
            queries: number of queries in the batch, B · Q.
        """
        return objects


@dataclass(frozen=True)
class VarifocalClassLoss(FocalClassLoss):
    """Focal loss whose target for a matched query is the IoU q of its box with the object.

    The loss of the logit of the true class is q times its binary cross-entropy with the target q.
    The other logits, true boxes and the matching cost are as in the focal loss. (After equation 2
    of VarifocalNet, arXiv 2008.13367; there, q = 0 gives the loss of negatives, and here no loss.
    This is not in the paper.)
    """

    def positives(self, logits: Tensor, ious: Tensor | None) -> Tensor:
        if ious is None:
            return super().positives(logits, None)
        return ious * F.binary_cross_entropy_with_logits(logits, ious, reduction="none")


@dataclass(frozen=True)
class SoftmaxClassLoss:
    """Cross-entropy of K classes and "no object", the last logit.

    Args:
        no_object_weight: weight of "no object"; the classes have weight 1.
    """

    no_object_weight: float

    def cost(self, logits: Tensor) -> Tensor:
        """Return the matching costs (..., K + 1): the negated probabilities."""
        return -logits.softmax(dim=-1)

    def entries(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities, (S, B, Q, K + 1)."""
        return logits.log_softmax(dim=-1)

    def negatives(self, entries: Tensor) -> Tensor:
        """Return the loss of each query if no query matches, (S, B, Q)."""
        return -self.no_object_weight * entries[..., -1]

    def total(
        self, entries: Tensor, negatives: Tensor, rows: Tensor, labels: Tensor, ious: Tensor | None
    ) -> Tensor:
        """Return the sums over images and queries, (S,), without the IoUs.

        See `FocalClassLoss.total`.
        """
        matched = -entries.flatten(0, 2)[rows, labels]
        return negatives.flatten().index_put((rows,), matched).view_as(negatives).sum((1, 2))

    def normalizer(self, objects: int, matched: int, queries: int) -> float:
        """Return the sum of the weights of all queries; see `FocalClassLoss.normalizer`."""
        return matched + self.no_object_weight * (queries - matched)


ClassLoss = FocalClassLoss | SoftmaxClassLoss
