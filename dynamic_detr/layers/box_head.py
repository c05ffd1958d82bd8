"""The box head of the DETR family, and the space that boxes are refined in."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "inverse_sigmoid"]


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        channels: of the input and of the hidden layers.
        out_channels: of the output.
        num_layers: linear layers; 3 in the box heads of DETR and its relatives.
    """

    def __init__(self, channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels] * num_layers + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., out_channels)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of numbers in [0, 1], both terms at least eps."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
