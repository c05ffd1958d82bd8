"""Dynamic ReLU (equation 6): the slopes and intercepts of two linear functions are read off the
whole map, and each pixel takes the larger of the two. It is the encoder's channel attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DyReLU", "hard_sigmoid"]


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6, which PyTorch's own computes with a float32 of 1/6 in float64 too."""
    return F.relu6(x + 3) / 6


class DyReLU(nn.Module):
    """max(a1·x + b1, a2·x + b2), with coefficients per image and channel.

    Args:
        channels: C.
        reduction: the hidden layer has C / reduction units.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, 4 * channels)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        """(B, C, H, W) from features of that shape and their means, (B, C)."""
        y = hard_sigmoid(self.expand(F.relu(self.reduce(pooled)))) - 0.5
        a1, b1, a2, b2 = y[:, :, None, None].chunk(4, dim=1)
        return torch.maximum((2 * a1 + 1) * features + b1, 2 * a2 * features + b2)
