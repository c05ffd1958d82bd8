"""GroupNorm as what it does to a map: a gain and a shift for every channel of every image."""

import torch
from torch import Tensor

__all__ = ["group_norm_affine"]


def group_norm_affine(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The GroupNorm of y as y · gain + shift, from the moments of each channel of y.

    Args:
        mean, variance: (..., C), of each channel over its pixels, as many for each channel of a
            group; the variance biased.
        weight, bias: the norm's, (C,) or anything that broadcasts to (..., C).
        num_groups: groups of channels.
        eps: added to the variance of a group.

    Returns:
        gain, shift: (..., C).
    """
    by_group = mean.unflatten(-1, (num_groups, -1))  # (..., G, C / G)
    centre = by_group.mean(dim=-1, keepdim=True)
    spread = variance.unflatten(-1, (num_groups, -1)) + (by_group - centre).square()
    scale = torch.rsqrt(spread.mean(dim=-1, keepdim=True) + eps)
    gain = scale.expand_as(by_group).flatten(-2) * weight
    return gain, bias - centre.expand_as(by_group).flatten(-2) * gain
