"""One block of the dynamic encoder.

For every level: offsets and modulations are predicted once from the level itself (equation 4)
and steer three deformable convolutions, on the coarser neighbour, on the level and on the finer
neighbour; a weight for each (equation 5) and a DyReLU (equation 6) make their mean the new level
(equation 7). The weights of the block are shared by all levels.

What follows the convolutions is bound by memory, so trips through it are what is counted, in maps
of a level's size, for a level with both neighbours (the map of the coarser one is ¼):

    forward                     trips      backward                               trips
    moments of each map, read    2 ¼       gradients of coefficients: maps and
    maps read again for the                gradient of the level, read             3 ¼
    weighted sum and DyReLU      2 ¼       gradients of maps: both read again      3 ¼
    level, written               1         written                                 2 ¼
    together                     5 ½       together                                8 ¾

Every one of them is needed: the statistics of a whole map come before its first normalised pixel,
and the gradients of the statistics before the gradient of its first pixel. All else, the norms,
weights and DyReLUs of all levels at once, happens on (L, 3, B, C) numbers, in float32. Operation by
operation it would be 40 ½ trips forward, without any padding to mask: biases 4 ½, norms 6 ¾,
upsampling 1 ¼, means 3, weighting 6, adding up 8, DyReLU 11; and more backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DyReLU, group_norm_affine, hard_sigmoid, linear
from ..ops import blend_dyrelu, deform_conv2d, masked_moments
from ..structures import Pyramid

__all__ = ["DynamicEncoderBlock"]

TAPS = 9  # of a 3×3 kernel

Maps = tuple[Tensor, Tensor | None, Tensor | None]  # same, finer, coarser


class NormedDeformConv(nn.Module):
    """Modulated deformable 3×3 convolution, and the parameters of the GroupNorm that follows.

    It leaves out its bias: the norm adds it where it costs nothing.
    """

    def __init__(self, channels: int, num_groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(num_groups, channels)
        self.stride = stride

    def forward(self, features: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W) features to the raw convolution."""
        return deform_conv2d(features, offset, mask, self.conv.weight, None, self.stride, padding=1)


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
        levels = range(len(pyramid))
        maps = [self._convolve(pyramid, level) for level in levels]
        moments, maps = zip(
            *(masked_moments(*maps[level], pyramid.sizes(level)) for level in levels), strict=True
        )
        coefficients = self._attend(torch.stack(moments, dim=1)).unbind()
        return pyramid.with_features(
            [blend_dyrelu(*level) for level in zip(maps, coefficients, strict=True)]
        )

    def _convolve(self, pyramid: Pyramid, level: int) -> Maps:
        """Equation 4."""
        features = pyramid.features
        steering = self.offset(features[level])
        steering = steering.to(torch.promote_types(steering.dtype, torch.float32))
        offset, mask = steering[:, : 2 * TAPS], steering[:, 2 * TAPS :].sigmoid()
        finer, coarser = None, None
        if level > 0:
            finer = self._from_finer(pyramid, level, offset, mask)
        if level < len(features) - 1:
            coarser = self._from_coarser(pyramid, level, offset, mask)
        return self.same(features[level], offset, mask), finer, coarser

    def _attend(self, moments: Tensor) -> Tensor:
        """Equations 5 and 6: the gains of the maps and the lines of the DyReLU of all levels,
        (L, 7, B, C), from (3, L, 3, B, C) moments."""
        mean, variance, pooled = moments
        with torch.autocast(moments.device.type, enabled=False):
            gain, shift = self._normalize(mean, variance)
            share = self._shares(mean)
            weight = hard_sigmoid(F.relu(linear(pooled * gain + shift, self.scale))) * share
            gain, shift = weight * gain, (weight * shift).sum(dim=1)
            a1, b1, a2, b2 = self.dyrelu((pooled * gain).sum(dim=1) + shift)
            lines = torch.stack([a1, a1 * shift + b1, a2, a2 * shift + b2], dim=1)
            coefficients = torch.cat([gain, lines], dim=1)
        if len(coefficients) == 1:
            # without neighbours their convolutions get a gradient too, of zero:
            # DistributedDataParallel waits for one
            unused = self.finer.conv.weight.sum() + self.coarser.conv.weight.sum()
            coefficients = coefficients + 0 * unused
        return coefficients

    def _normalize(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The three GroupNorms, of maps that lack the bias of their convolution, as gain and
        shift: all (L, 3, B, C)."""
        branches = (self.same, self.finer, self.coarser)

        def stacked(parameters: list[Tensor]) -> Tensor:
            return torch.stack(parameters)[:, None].to(mean.dtype)  # (3, 1, C)

        conv_bias = stacked([branch.conv.bias for branch in branches])
        gain, shift = group_norm_affine(
            mean + conv_bias,
            variance,
            stacked([branch.norm.weight for branch in branches]),
            stacked([branch.norm.bias for branch in branches]),
            self.same.norm.num_groups,
            self.same.norm.eps,
        )
        return gain, shift + conv_bias * gain

    @staticmethod
    def _shares(mean: Tensor) -> Tensor:
        """One by the number of maps of a level; 0 where there is no map: (L, 3, 1, 1)."""
        there = torch.ones_like(mean[:, :, :1, :1])
        there[0, 1], there[-1, 2] = 0, 0
        return there / there.sum(dim=1, keepdim=True)

    def _from_finer(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        ratio = pyramid.strides[level] / pyramid.strides[level - 1]
        return self.finer(pyramid.features[level - 1], offset * ratio, mask)

    def _from_coarser(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        ratio = pyramid.strides[level] / pyramid.strides[level + 1]
        steering = self._halve(torch.cat([offset * ratio, mask], dim=1), pyramid, level)
        return self.coarser(
            pyramid.features[level + 1], steering[:, : 2 * TAPS], steering[:, 2 * TAPS :]
        )

    @staticmethod
    def _halve(steering: Tensor, pyramid: Pyramid, level: int) -> Tensor:
        """Mean over the true pixels of each 2×2 block; 0 where a block has none."""

        def mean(values: Tensor) -> Tensor:
            return F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)

        if pyramid.is_unpadded(level):
            return mean(steering)
        valid = pyramid.valid_mask(level).to(steering.dtype)
        return mean(steering * valid) / mean(valid).clamp(min=0.25)
