"""The two terms of the focal loss (Focal Loss for Dense Object Detection, equation 5).

The negative term does not depend on the matching, so it can be computed first. fvcore's
`sigmoid_focal_loss` computes both terms at once, from targets.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["focal_negative", "focal_positive"]


def focal_positive(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return -α · (1 - p)^γ · log p with p = sigmoid(logits), the loss for target 1."""
    return alpha * (-logits).sigmoid() ** gamma * F.softplus(-logits)


def focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return -(1 - α) · p^γ · log(1 - p) with p = sigmoid(logits), the loss for target 0."""
    return (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
