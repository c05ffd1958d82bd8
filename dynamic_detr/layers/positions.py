"""Sine position embeddings (Attention Is All You Need, section 3.5; DETR, appendix A.4)."""

import math

import torch
from torch import Tensor

from ..structures import Pyramid

__all__ = ["sine_embedding", "sine_positions"]

TEMPERATURE = 10_000


def sine_embedding(coordinates: Tensor, channels: int) -> Tensor:
    """Embed coordinates by sines and cosines of geometrically spaced frequencies.

    Args:
        coordinates: (..., N), normalised; 1 is an angle of 2π at the highest frequency.
        channels: embedding channels of each coordinate, even.

    Returns:
        (..., N · channels) in float32 or wider: sine and cosine of each frequency, interleaved, for
        each coordinate.
    """
    coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
    exponent = torch.arange(channels // 2, device=coordinates.device) * 2 / channels
    frequencies = 2 * math.pi / TEMPERATURE ** exponent.to(coordinates.dtype)
    angles = coordinates[..., None] * frequencies  # (..., N, channels / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def sine_positions(pyramid: Pyramid, channels: int, offset: float) -> Tensor:
    """Embed the positions of a pyramid, normalised by the true size of the level in cells.

    The result is computed once for all pyramids that share the sizes.

    Args:
        pyramid: pyramid of L levels.
        channels: C, divisible by 4.
        offset: added to the row and column indices: 1 as in DETR, 0.5 (the centres of the cells) as
            in Deformable DETR.

    Returns:
        (B, ΣHW, C) for the rows of the pyramid's table, in float32: C / 2 channels for y, then
        C / 2 for x.
    """

    def embed() -> Tensor:
        levels = []
        for level, centers in enumerate(pyramid.level_centers()):
            size = pyramid.sizes(level).flip(-1)[:, None]  # (B, 1, 2), x, y
            levels.append((centers + (offset - 0.5) / size).flip(-1))
        return sine_embedding(torch.cat(levels, dim=1), channels // 2)

    return pyramid.cached(("sine_positions", channels, offset), embed)
