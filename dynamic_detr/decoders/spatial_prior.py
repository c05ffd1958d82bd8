"""Spatial prior of SMCA (equations 3, 4 and 6): Gaussian-like weights around a centre."""

import torch
from torch import Tensor, nn

from ..structures import Pyramid

__all__ = ["SpatialPrior"]

NUM_SCALES = {"independent": 2, "single": 1, "fixed": 0}  # predicted scales of each prior


class SpatialPrior(nn.Module):
    """log G = −Σ (scale · (position − centre))² / β over x and y, in cells of the level.

    The centre is the reference point of the query plus an unbounded offset. Offsets are initially 0
    and scales 1.

    Args:
        channels: C.
        num_priors: number of heads, or 1 if all heads share one prior.
        scales: "independent" scales of x and y, a "single" scale for both, or "fixed" at 1.
        beta: bandwidth β.
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
        """Initialise the layers."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)
        if self.num_scales:
            nn.init.zeros_(self.scales.weight)
            nn.init.ones_(self.scales.bias)

    def forward(
        self, guides: Tensor, references: Tensor, pyramid: Pyramid
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the log-prior of each level, shifted so that its maximum is 0.

        The shift keeps the softmax finite in half precision for centres far outside the image.

        Args:
            guides: (B, Q, C), input of the layers that predict offsets and scales.
            references: (B, Q, 2) x, y, normalised by the image.
            pyramid: pyramid of L levels.

        Returns:
            For each level the shifted log-prior (B, num_priors, Q, HW), with -inf in the padding,
            and the subtracted maximum (B, num_priors, Q, 1), detached; in the dtype of the
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
    """Return the shifted log-weights along x or y, and the subtracted maximum.

    Args:
        centers: (..., 1), in cells.
        precisions: (..., 1), squared scales divided by β.
        sizes: (..., 1), true size of the level in cells.
        length: padded size of the level in cells.

    Returns:
        (..., length) and (..., 1).
    """
    index = torch.arange(length, device=centers.device)
    logs = (-precisions * (index - centers).square()).masked_fill(index >= sizes, -torch.inf)
    largest = logs.detach().amax(dim=-1, keepdim=True)
    return logs - largest, largest
