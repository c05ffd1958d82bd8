"""The two terms of the focal loss (Focal Loss for Dense Object Detection, equation 5).

The negative term does not depend on the matching, so it can be computed first.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["focal_negative", "focal_positive"]


def focal_positive(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """The loss of logits whose target is 1: -α · (1 - p)^γ · log p, for p = sigmoid(logits)."""
    return alpha * (-logits).sigmoid() ** gamma * F.softplus(-logits)


def focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """The loss of logits whose target is 0: -(1 - α) · p^γ · log(1 - p)."""
    return (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
