"""Box head of the DETR family, and the inverse sigmoid for box refinement."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "inverse_sigmoid"]


class MLP(nn.Module):
    """Multi-layer perceptron with ReLU; its weights have DETR's names, unlike torchvision's `MLP`.

    Args:
        channels: channels C of the input and of the hidden layers.
        out_channels: channels of the output.
        num_layers: linear layers.
    """

    def __init__(self, channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels] * num_layers + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., out_channels)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(max(x, eps) / max(1 - x, eps)) for x clamped to [0, 1], as Deformable DETR.

    `torch.logit` clamps x to [eps, 1 - eps] instead.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
