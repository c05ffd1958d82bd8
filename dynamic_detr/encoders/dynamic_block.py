"""One block of the dynamic encoder.

For every level: offsets and modulations are predicted once from the level itself (equation 4)
and steer three deformable convolutions, on the coarser neighbour, on the level and on the finer
neighbour; a weight for each (equation 5) and a DyReLU (equation 6) make their mean the new level
(equation 7). The weights of the block are shared by all levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DyReLU, MaskedGroupNorm, masked_mean, replicate_edge, upsample_twice
from ..layers.dyrelu import hard_sigmoid
from ..ops import deform_conv2d
from ..structures import Pyramid

__all__ = ["DynamicEncoderBlock"]

TAPS = 9  # of a 3×3 kernel


class NormedDeformConv(nn.Module):
    """Modulated deformable 3×3 convolution and GroupNorm over true pixels."""

    def __init__(self, channels: int, num_groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.norm = MaskedGroupNorm(num_groups, channels)
        self.stride = stride

    def forward(
        self, features: Tensor, offset: Tensor, mask: Tensor, pyramid: Pyramid, level: int
    ) -> Tensor:
        """Convolves (B, C, H, W) features; `level` is the level of the output."""
        out = deform_conv2d(
            features, offset, mask, self.conv.weight, self.conv.bias, self.stride, padding=1
        )
        return self.norm(out, pyramid, level)


class DynamicEncoderBlock(nn.Module):
    """Pyramid to pyramid of the same shape.

    An offset is a displacement in pixels of the level that predicts it. At a neighbour it is
    multiplied by the ratio of the strides, so that all three convolutions look at the same place
    in the image; for the grid of the coarser neighbour, offsets and modulations are averaged over
    the true pixels of each 2×2 block.

    Args:
        channels: C.
        num_groups: groups of each GroupNorm.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
        self.coarser = NormedDeformConv(channels, num_groups, stride=1)
        self.same = NormedDeformConv(channels, num_groups, stride=1)
        self.finer = NormedDeformConv(channels, num_groups, stride=2)
        self.scale = nn.Linear(channels, 1)
        self.dyrelu = DyReLU(channels)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Features beyond the true sizes are taken to be zero, and are zero in the result."""
        levels = [self._level(pyramid, level) for level in range(len(pyramid))]
        return pyramid.with_features(levels).masked()

    def _level(self, pyramid: Pyramid, level: int) -> Tensor:
        features = pyramid.features
        steering = self.offset(features[level])
        steering = steering.to(torch.promote_types(steering.dtype, torch.float32))
        offset, mask = steering[:, : 2 * TAPS], steering[:, 2 * TAPS :].sigmoid()
        maps = [self.same(features[level], offset, mask, pyramid, level)]
        if level > 0:
            maps.append(self._from_finer(pyramid, level, offset, mask))
        if level < len(features) - 1:
            maps.append(self._from_coarser(pyramid, level, offset, mask))
        pooled = [masked_mean(m, pyramid, level) for m in maps]
        weights = [hard_sigmoid(F.relu(self.scale(p))) / len(maps) for p in pooled]  # (B, 1)
        weighted = [m * w.to(m.dtype)[:, :, None, None] for m, w in zip(maps, weights, strict=True)]
        mean = sum(p * w for p, w in zip(pooled, weights, strict=True))  # of the sum below
        return self.dyrelu(sum(weighted), mean)

    def _from_finer(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        ratio = pyramid.strides[level] / pyramid.strides[level - 1]
        return self.finer(pyramid.features[level - 1], offset * ratio, mask, pyramid, level)

    def _from_coarser(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        ratio = pyramid.strides[level] / pyramid.strides[level + 1]
        steering = self._halve(torch.cat([offset * ratio, mask], dim=1), pyramid, level)
        out = self.coarser(
            pyramid.features[level + 1],
            steering[:, : 2 * TAPS],
            steering[:, 2 * TAPS :],
            pyramid,
            level + 1,
        )
        out = replicate_edge(out, pyramid, level + 1)
        return upsample_twice(out, pyramid.features[level].shape[-2:])

    @staticmethod
    def _halve(steering: Tensor, pyramid: Pyramid, level: int) -> Tensor:
        """Mean over the true pixels of each 2×2 block; 0 where a block has none."""

        def mean(values: Tensor) -> Tensor:
            return F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)

        if pyramid.filled(level):
            return mean(steering)
        valid = pyramid.valid(level).to(steering.dtype)
        return mean(steering * valid) / mean(valid).clamp(min=0.25)
