"""What `masked_moments` and `blend_dyrelu` compute, image by image, cut to its true size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def images(same, finer, coarser, sizes):
    """The true pixels of each image's maps, and of the coarser one upsampled: (C, h, w)."""
    for image, (h, w) in enumerate(sizes.tolist()):
        half = None
        if coarser is not None:
            half = coarser[image, :, : (h + 1) // 2, : (w + 1) // 2]
        own = [None if m is None else m[image, :, :h, :w] for m in (same, finer)] + [half]
        seen = list(own)
        if half is not None:
            seen[2] = F.interpolate(half[None], scale_factor=2, mode="bilinear")[0, :, :h, :w]
        yield own, seen


def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """(3, 3, B, C)."""
    nothing = same.new_zeros(3, same.shape[1])
    result = []
    for own, seen in images(same, finer, coarser, sizes):
        maps = []
        for at_home, upsampled in zip(own, seen, strict=True):
            if at_home is None:
                maps.append(nothing)
                continue
            variance, mean = torch.var_mean(at_home, dim=(1, 2), correction=0)
            maps.append(torch.stack([mean, variance, upsampled.mean(dim=(1, 2))]))
        result.append(torch.stack(maps, dim=1))
    return torch.stack(result, dim=2)


def blend(same, finer, coarser, sizes: Tensor, coefficients: Tensor) -> Tensor:
    """(B, C, H, W)."""
    _, _, height, width = same.shape
    result = []
    for image, (_, seen) in enumerate(images(same, finer, coarser, sizes)):
        *gains, a1, b1, a2, b2 = coefficients[:, image, :, None, None]
        x = sum(gain * m for gain, m in zip(gains, seen, strict=True) if m is not None)
        level = torch.maximum(a1 * x + b1, a2 * x + b2)
        result.append(F.pad(level, (0, width - level.shape[2], 0, height - level.shape[1])))
    return torch.stack(result)
