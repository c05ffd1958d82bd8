"""The dynamic encoder block as the published DyHead code computes it, for its checkpoints.

That code hands the offsets of a level unresized to the convolution on the coarser neighbour,
whose kernel reads them from memory as if they had the neighbour's size; it leaves the offsets
for the finer neighbour unscaled, resizes with align_corners=True, and counts the padding in its
statistics.
"""

import torch.nn.functional as F
from torch import Tensor

from ..structures import Pyramid
from .dynamic_block import TAPS, DynamicEncoderBlock

__all__ = ["LegacyDynamicEncoderBlock"]


class LegacyDynamicEncoderBlock(DynamicEncoderBlock):
    """Arguments as `DynamicEncoderBlock`; what it says of an image depends on the padding."""

    def forward(self, pyramid: Pyramid) -> Pyramid:
        padded = pyramid.image_sizes.new_tensor(pyramid.features[0].shape[-2:])
        whole = Pyramid(
            pyramid.features,
            pyramid.strides,
            (padded * pyramid.strides[0]).expand_as(pyramid.image_sizes),
        )
        return pyramid.with_features(super().forward(whole).features)

    def _from_finer(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        return self.finer(pyramid.features[level - 1], offset, mask, pyramid, level)

    def _from_coarser(self, pyramid: Pyramid, level: int, offset: Tensor, mask: Tensor) -> Tensor:
        coarser = pyramid.features[level + 1]
        height, width = coarser.shape[-2:]

        def read_flat(values: Tensor, channels: int) -> Tensor:
            flat = values.contiguous().flatten(1)[:, : channels * height * width]
            return flat.view(-1, channels, height, width)

        out = self.coarser(
            coarser, read_flat(offset, 2 * TAPS), read_flat(mask, TAPS), pyramid, level + 1
        )
        size = pyramid.features[level].shape[-2:]
        return F.interpolate(out, size=size, mode="bilinear", align_corners=True)
