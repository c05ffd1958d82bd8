"""The dynamic encoder block as the published DyHead code computes it, for its checkpoints.

That code hands the offsets of a level unresized to the convolution on the coarser neighbour,
whose kernel reads them from memory as if they had the neighbour's size; it leaves the offsets
for the finer neighbour unscaled, resizes with align_corners=True, and counts the padding in its
statistics. It has neither true sizes nor a twofold upsampling, so that here plain operators do what
`masked_moments` and `blend_dyrelu` do for `DynamicEncoderBlock`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import Pyramid
from .dynamic_block import TAPS, DynamicEncoderBlock, Maps

__all__ = ["LegacyDynamicEncoderBlock"]


class LegacyDynamicEncoderBlock(DynamicEncoderBlock):
    """Arguments as `DynamicEncoderBlock`; what it says of an image depends on the padding."""

    def forward(self, pyramid: Pyramid) -> Pyramid:
        maps = [self._convolve(pyramid, level) for level in range(len(pyramid))]
        moments = torch.stack([_moments(level) for level in maps], dim=1)
        coefficients = self._attend(moments)
        levels = zip(maps, coefficients.unbind(), strict=True)
        return pyramid.with_features([_blend(*level) for level in levels])

    def _from_finer(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        return self.finer(pyramid.features[level - 1], offset, mask)

    def _from_coarser(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        coarser = pyramid.features[level + 1]
        height, width = coarser.shape[-2:]

        def read_flat(values: Tensor, channels: int) -> Tensor:
            flat = values.contiguous().flatten(1)[:, : channels * height * width]
            return flat.view(-1, channels, height, width)

        return self.coarser(coarser, read_flat(offset, 2 * TAPS), read_flat(mask, TAPS))


def _resized(features: Tensor, like: Tensor) -> Tensor:
    if features.shape == like.shape:
        return features
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=True)


def _moments(maps: Maps) -> Tensor:
    """(3, 3, B, C) as of `masked_moments`, over all pixels."""
    same = maps[0].to(torch.promote_types(maps[0].dtype, torch.float32))
    moments = []
    for features in maps:
        if features is None:
            moments.append(same.new_zeros((3, *same.shape[:2])))
            continue
        features = features.to(same.dtype)
        variance, mean = torch.var_mean(features, dim=(2, 3), correction=0)
        pooled = _resized(features, same).mean(dim=(2, 3))
        moments.append(torch.stack([mean, variance, pooled]))
    return torch.stack(moments, dim=1)


def _blend(maps: Maps, coefficients: Tensor) -> Tensor:
    """The level (B, C, H, W), from its maps and `coefficients` as of `blend_dyrelu`."""
    *gains, a1, b1, a2, b2 = coefficients[..., None, None]
    x = sum(
        _resized(features, maps[0]) * gain
        for features, gain in zip(maps, gains, strict=True)
        if features is not None
    )
    return torch.maximum(a1 * x + b1, a2 * x + b2).to(maps[0].dtype)
