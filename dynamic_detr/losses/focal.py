"""The two halves of the focal loss (Focal Loss for Dense Object Detection, equation 5): what an
entry pays if it should have said yes, and if it should have said no.

Which entries should say yes is known only after the matching; what no costs does not wait for it.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["focal_no", "focal_yes"]


def focal_yes(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """-α · (1 - p)^γ · log p, of any shape, for p = sigmoid(logits)."""
    return alpha * (-logits).sigmoid() ** gamma * F.softplus(-logits)


def focal_no(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """-(1 - α) · p^γ · log(1 - p), of any shape, for p = sigmoid(logits)."""
    return (1 - alpha) * logits.sigmoid() ** gamma * F.softplus(logits)
