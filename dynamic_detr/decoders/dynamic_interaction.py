"""Dynamic filters of the decoder (equations 10 and 11).

A query generates the weights of 1×1 convolutions for the region of its box. Each is one matrix
product of the positions (P, C_in) and the filter (C_in, C_out).
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DYNAMIC_FILTERS",
    "BottleneckInteraction",
    "ResidualInteraction",
    "SingleInteraction",
]


class _Readout(nn.Module):
    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(positions * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, regions: Tensor) -> Tensor:
        """Map filtered regions (B, Q, P, C) to (B, Q, C)."""
        return F.relu(self.norm(self.linear(regions.flatten(2))))


class _TwoFilters(nn.Module):
    def __init__(self, channels: int, positions: int, dynamic_dim: int) -> None:
        super().__init__()
        self.filters = nn.Linear(channels, 2 * channels * dynamic_dim)
        self.norm_reduce = nn.LayerNorm(dynamic_dim)
        self.readout = _Readout(channels, positions)

    def filtered(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Return the output of the second filter, (B, Q, P, C)."""
        reduce, expand = self.filters(queries).chunk(2, dim=-1)
        channels = queries.shape[-1]
        regions = regions @ reduce.unflatten(-1, (channels, -1))
        regions = F.relu(self.norm_reduce(regions))
        return regions @ expand.unflatten(-1, (-1, channels))


class BottleneckInteraction(_TwoFilters):
    """Two dynamic filters C → D → C, each followed by LayerNorm and ReLU.

    Args:
        channels: C.
        positions: P, the bins of a region, R².
        dynamic_dim: D.
    """

    def __init__(self, channels: int, positions: int, dynamic_dim: int) -> None:
        super().__init__(channels, positions, dynamic_dim)
        self.norm_expand = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Map queries (B, Q, C) and their regions (B, Q, P, C) to (B, Q, C)."""
        return self.readout(F.relu(self.norm_expand(self.filtered(queries, regions))))


class ResidualInteraction(_TwoFilters):
    """The two dynamic filters as a residual branch: their output is added to the region.

    The scale of the last LayerNorm is initialised to 0, so the stage starts as a linear layer on
    the region. With the filters in between, a stage with random weights learns classes slowly
    (docs/learning.md). This is not in the paper.

    Args:
        channels: C.
        positions: P, the bins of a region, R².
        dynamic_dim: D.
    """

    def __init__(self, channels: int, positions: int, dynamic_dim: int) -> None:
        super().__init__(channels, positions, dynamic_dim)
        self.norm_branch = nn.LayerNorm(channels)
        nn.init.zeros_(self.norm_branch.weight)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Map queries (B, Q, C) and their regions (B, Q, P, C) to (B, Q, C)."""
        return self.readout(regions + self.norm_branch(self.filtered(queries, regions)))


class SingleInteraction(nn.Module):
    """One dynamic filter C → C, followed by LayerNorm and ReLU, as in equation 11.

    Args:
        channels: C.
        positions: P, the bins of a region, R².
        dynamic_dim: unused, as there is no bottleneck.
    """

    def __init__(self, channels: int, positions: int, dynamic_dim: int = 0) -> None:
        super().__init__()
        self.filters = nn.Linear(channels, channels * channels)
        self.norm = nn.LayerNorm(channels)
        self.readout = _Readout(channels, positions)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Map queries (B, Q, C) and their regions (B, Q, P, C) to (B, Q, C)."""
        filters = self.filters(queries).unflatten(-1, (queries.shape[-1], -1))
        return self.readout(F.relu(self.norm(regions @ filters)))


DYNAMIC_FILTERS = {
    "bottleneck": BottleneckInteraction,
    "residual": ResidualInteraction,
    "single": SingleInteraction,
}
