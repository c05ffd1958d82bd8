"""Dynamic ReLU (equation 6), the channel attention of the encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fuse_levels import hard_sigmoid

__all__ = ["DyReLU", "hard_sigmoid"]


class DyReLU(nn.Module):
    """max(a1·x + b1, a2·x + b2), with coefficients predicted from the mean of the map.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // 4)
        self.expand = nn.Linear(channels // 4, 4 * channels)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        """Apply the activation to features (B, C, H, W) with the means (B, C)."""
        y = hard_sigmoid(self.expand(F.relu(self.reduce(pooled)))) - 0.5
        a1, b1, a2, b2 = y[:, :, None, None].chunk(4, dim=1)
        return torch.maximum((2 * a1 + 1) * features + b1, 2 * a2 * features + b2)
