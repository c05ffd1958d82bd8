"""The spatial prior of SMCA (equations 3, 4 and 6): where a query expects its object, as the
logarithm of a Gaussian-like weight for each position of a level."""

import torch
from torch import Tensor, nn

from ..structures import Pyramid

__all__ = ["SpatialPrior"]

NUM_SCALES = {"independent": 2, "single": 1, "fixed": 0}  # of each prior


class SpatialPrior(nn.Module):
    """log G = −Σ (scale · (position − centre))² / β, over x and y, in cells of the level.

    The centre is the query's reference point, the same for all layers and heads, and an offset
    without bounds for each layer and head. Offsets start at 0 and scales at 1.

    Args:
        channels: C.
        num_priors: heads that have a prior of their own; 1 if all share one.
        scales: "independent" ones of x and y, a "single" one for both, or "fixed" at 1.
        beta: β, the bandwidth.
    """

    def __init__(self, channels: int, num_priors: int, scales: str, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.num_scales = NUM_SCALES[scales]
        self.offsets = nn.Linear(channels, 2 * num_priors)
        if self.num_scales:
            self.scales = nn.Linear(channels, self.num_scales * num_priors)
        self.reset()

    def reset(self) -> None:
        """Gives the layers their first values."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)
        if self.num_scales:
            nn.init.zeros_(self.scales.weight)
            nn.init.ones_(self.scales.bias)

    def forward(
        self, guides: Tensor, references: Tensor, pyramid: Pyramid
    ) -> list[tuple[Tensor, Tensor]]:
        """The logarithm of the prior on each level, as a map whose largest value is 0.

        However far away a centre is, the softmax of such a map is finite, in half precision too.

        Args:
            guides: (B, Q, C), what offsets and scales are predicted from.
            references: (B, Q, 2) x, y, normalised by the image.
            pyramid: of L levels.

        Returns:
            For each level the map (B, num_priors, Q, HW), minus infinity beyond the true size, and
            what was subtracted (B, num_priors, Q, 1), without gradient; in the dtype of the
            references.
        """
        dtype = references.dtype
        offsets = self.offsets(guides).to(dtype).unflatten(-1, (-1, 2)).transpose(1, 2)
        precisions = torch.full_like(offsets, 1 / self.beta)  # (B, priors, Q, 2)
        if self.num_scales:
            scales = self.scales(guides).to(dtype).unflatten(-1, (-1, self.num_scales))
            precisions = scales.transpose(1, 2).square() * precisions
        levels = []
        for level, (height, width) in enumerate(pyramid.shapes):
            sizes = pyramid.sizes(level).flip(-1)[:, None, None]  # (B, 1, 1, 2), x, y
            centers = references[:, None] * sizes + offsets
            both = (part.chunk(2, dim=-1) for part in (centers, precisions, sizes))
            sides = zip(*both, strict=True)
            (x, largest_x), (y, largest_y) = (
                _log_weights(*side, length)
                for side, length in zip(sides, (width, height), strict=True)
            )
            log_prior = y[..., :, None] + x[..., None, :]  # (B, priors, Q, H, W)
            levels.append((log_prior.flatten(-2), largest_x + largest_y))
        return levels


def _log_weights(
    centers: Tensor, precisions: Tensor, sizes: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The logarithm of the weights along one side of a level, from (..., 1) centres, precisions
    and true sizes: (..., length), 0 at most, and what was subtracted (..., 1)."""
    index = torch.arange(length, device=centers.device)
    logs = (-precisions * (index - centers).square()).masked_fill(index >= sizes, -torch.inf)
    largest = logs.detach().amax(dim=-1, keepdim=True)
    return logs - largest, largest
