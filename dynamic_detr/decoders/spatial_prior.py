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

    def forward(self, guides: Tensor, references: Tensor, pyramid: Pyramid) -> list[Tensor]:
        """The logarithm of the prior on each level.

        Args:
            guides: (B, Q, C), what offsets and scales are predicted from.
            references: (B, Q, 2) x, y, normalised by the image.
            pyramid: of L levels.

        Returns:
            For each level (B, num_priors, Q, HW) in the dtype of the references, 0 at most: each
            query's priors on all levels are divided by the largest weight among them, so that a
            centre far away leaves weights that are not all 0. Minus infinity beyond the true size.
        """
        dtype = references.dtype
        offsets = self.offsets(guides).to(dtype).unflatten(-1, (-1, 2)).transpose(1, 2)
        precisions = references.new_ones(()) / self.beta
        if self.num_scales:
            scales = self.scales(guides).to(dtype).unflatten(-1, (-1, self.num_scales))
            precisions = scales.transpose(1, 2).square() * precisions
        precisions = precisions.expand(offsets.shape)  # (B, priors, Q, 2)
        levels = []
        for level, (height, width) in enumerate(pyramid.shapes):
            sizes = pyramid.sizes(level).flip(-1)[:, None, None]  # (B, 1, 1, 2), x, y
            centers = references[:, None] * sizes + offsets  # (B, priors, Q, 2)
            levels.append(
                [
                    _log_weights(
                        centers[..., [axis]], precisions[..., [axis]], sizes[..., [axis]], n
                    )
                    for axis, n in enumerate((width, height))
                ]
            )  # along x (B, priors, Q, W) and along y (B, priors, Q, H)
        largest = torch.stack([_largest(x) + _largest(y) for x, y in levels]).amax(dim=0)
        return [((y - largest)[..., :, None] + x[..., None, :]).flatten(-2) for x, y in levels]


def _log_weights(centers: Tensor, precisions: Tensor, sizes: Tensor, length: int) -> Tensor:
    """The logarithm of the weights along one side of a level: (..., 1) to (..., length)."""
    index = torch.arange(length, device=centers.device)
    return (-precisions * (index - centers).square()).masked_fill(index >= sizes, -torch.inf)


def _largest(log_weights: Tensor) -> Tensor:
    """Without gradient: a softmax does not depend on what is subtracted from all its logits."""
    return log_weights.detach().amax(dim=-1, keepdim=True)
