"""Class head, and the class scores of its logits.

With "focal" a query has K independent sigmoid logits; with "softmax" it has K + 1 logits, the last
one for "no object".
"""

import math

import torch
from torch import Tensor, nn

from ..config import check_arguments

__all__ = ["ClassHead", "class_scores"]

PRIOR = 0.01  # initial probability of sigmoid logits (Focal Loss, section 4.1)


class ClassHead(nn.Linear):
    """Linear layer from queries to class logits.

    Args:
        channels: C.
        num_classes: K.
        class_head: "focal" or "softmax".

    Raises:
        ValueError: num_classes or class_head is out of range.
    """

    def __init__(self, channels: int, num_classes: int, class_head: str) -> None:
        check_arguments("MODEL.SET_DETECTOR", num_classes=num_classes, class_head=class_head)
        super().__init__(channels, num_classes + (class_head == "softmax"))
        prior = PRIOR if class_head == "focal" else 0.5
        nn.init.constant_(self.bias, math.log(prior / (1 - prior)))


def class_scores(logits: Tensor, class_head: str) -> Tensor:
    """Return the score of each query for each class.

    With "focal" a query may detect several classes, as in Deformable DETR. With "softmax" it
    detects only its most probable class, as in DETR.

    Args:
        logits: (..., K) with "focal", (..., K + 1) with "softmax".
        class_head: "focal" or "softmax".

    Returns:
        (..., K) probabilities; -1 for all but the most probable class with "softmax".
    """
    check_arguments("MODEL.SET_DETECTOR", class_head=class_head)
    if class_head == "focal":
        return logits.sigmoid()
    scores = logits.softmax(dim=-1)[..., :-1]
    best = scores.argmax(dim=-1, keepdim=True)
    return torch.full_like(scores, -1).scatter(-1, best, scores.gather(-1, best))
