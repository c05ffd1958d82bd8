"""Dynamic ReLU (equation 6): the slopes and intercepts of two lines are read off the whole map,
and each pixel takes the larger of the two. It is the channel attention of the encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DyReLU", "hard_sigmoid", "linear"]


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6."""
    return F.relu6(x + 3) / 6


class DyReLU(nn.Module):
    """The lines of max(a1·x + b1, a2·x + b2), with coefficients per image and channel.

    Args:
        channels: C.
        reduction: the hidden layer has C / reduction units.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, 4 * channels)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a1, b1, a2, b2, each (..., C), from the mean of the map (..., C), in its dtype."""
        hidden = F.relu(linear(pooled, self.reduce))
        a1, b1, a2, b2 = (hard_sigmoid(linear(hidden, self.expand)) - 0.5).chunk(4, dim=-1)
        return 2 * a1 + 1, b1, 2 * a2, b2


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer in the dtype of x, whatever that of its parameters."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
