"""The class head: the layer from queries to class logits, and the way from logits to scores.

With "focal" a query has K independent sigmoid logits, with "softmax" K + 1, the last one for "no
object".
"""

import math

import torch
from torch import Tensor, nn

from ..config import check_arguments

__all__ = ["ClassHead", "class_scores"]

PRIOR = 0.01  # probability that sigmoid logits start with (Focal Loss, section 4.1)


class ClassHead(nn.Linear):
    """A linear layer to class logits.

    Args:
        channels: C.
        num_classes: K.
        class_head: "focal" or "softmax".

    Raises:
        ValueError: class_head is neither, or there is no class.
    """

    def __init__(self, channels: int, num_classes: int, class_head: str) -> None:
        check_arguments("MODEL.SET_DETECTOR", num_classes=num_classes, class_head=class_head)
        super().__init__(channels, num_classes + (class_head == "softmax"))
        self.class_head = class_head
        self.reset_bias()

    def reset_bias(self) -> None:
        """Sigmoid logits start at a probability of 0.01, softmax logits are equal."""
        prior = PRIOR if self.class_head == "focal" else 0.5
        nn.init.constant_(self.bias, math.log(prior / (1 - prior)))


def class_scores(logits: Tensor, class_head: str) -> Tensor:
    """The score of each class in the answer of a query.

    A query may answer for several classes with the focal head, as in Deformable DETR; with the
    softmax head it answers for its most probable class alone, as in DETR.

    Args:
        logits: (..., K) with "focal", (..., K + 1) with "softmax".
        class_head: "focal" or "softmax".

    Returns:
        (..., K) probabilities; -1 for classes that the query does not answer for.
    """
    check_arguments("MODEL.SET_DETECTOR", class_head=class_head)
    if class_head == "focal":
        return logits.sigmoid()
    scores = logits.softmax(dim=-1)[..., :-1]
    answer = scores.argmax(dim=-1, keepdim=True)
    return torch.full_like(scores, -1).scatter(-1, answer, scores.gather(-1, answer))
