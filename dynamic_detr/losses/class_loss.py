"""Class loss and class cost of the two kinds of class head: `FocalClassLoss` and
`SoftmaxClassLoss`, with the same methods.

The loss is computed in two parts. `negatives` is the loss if no query were matched, and needs no
matching; `total` replaces the terms of the matched queries.
"""

from dataclasses import dataclass

from torch import Tensor

from .focal import focal_negative, focal_positive

__all__ = ["ClassLoss", "FocalClassLoss", "SoftmaxClassLoss"]


@dataclass(frozen=True)
class FocalClassLoss:
    """Focal loss of K independent sigmoid logits.

    Args:
        alpha: weight of positives, in [0, 1].
        gamma: exponent.
    """

    alpha: float
    gamma: float

    def cost(self, logits: Tensor) -> Tensor:
        """The matching cost of every class, of any shape (…, K): the focal loss that the query
        would add."""
        positive = focal_positive(logits, self.alpha, self.gamma)
        return positive - focal_negative(logits, self.alpha, self.gamma)

    def entries(self, logits: Tensor) -> Tensor:
        """What the other methods take, (S, B, Q, K)."""
        return logits

    def negatives(self, entries: Tensor) -> Tensor:
        """(S, B, Q, K), the loss of each logit if no query were matched."""
        return focal_negative(entries, self.alpha, self.gamma)

    def total(self, entries: Tensor, negatives: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """(S,), the sum over images and queries.

        Args:
            entries, negatives: see above.
            rows: (S, M) int64, the matched queries, counted over stages, images and queries.
            labels: (S, M) int64, the classes of their objects.
        """
        matched = entries.flatten(0, 2)[rows, labels]
        positives = focal_positive(matched, self.alpha, self.gamma)
        place = rows * entries.shape[-1] + labels
        return negatives.flatten().index_put((place,), positives).view_as(negatives).sum((1, 2, 3))

    def normalizer(self, objects: int, matched: int, queries: int) -> float:
        """The number that the sum is divided by, of one process: its objects.

        Args:
            objects: all objects of the batch.
            matched: queries that are matched, at most as many.
            queries: all queries of the batch, B · Q.
        """
        return objects


@dataclass(frozen=True)
class SoftmaxClassLoss:
    """Cross-entropy over K classes and "no object", the last logit.

    Args:
        no_object_weight: weight of "no object"; classes have weight 1.
    """

    no_object_weight: float

    def cost(self, logits: Tensor) -> Tensor:
        """The matching cost of every class, (…, K + 1): minus its probability."""
        return -logits.softmax(dim=-1)

    def entries(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities, (S, B, Q, K + 1)."""
        return logits.log_softmax(dim=-1)

    def negatives(self, entries: Tensor) -> Tensor:
        """(S, B, Q), the loss of each query if none were matched."""
        return -self.no_object_weight * entries[..., -1]

    def total(self, entries: Tensor, negatives: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """(S,); arguments as in `FocalClassLoss.total`."""
        matched = -entries.flatten(0, 2)[rows, labels]
        return negatives.flatten().index_put((rows,), matched).view_as(negatives).sum((1, 2))

    def normalizer(self, objects: int, matched: int, queries: int) -> float:
        """The sum of the weights of all queries; arguments as in `FocalClassLoss.normalizer`."""
        return matched + self.no_object_weight * (queries - matched)


ClassLoss = FocalClassLoss | SoftmaxClassLoss
