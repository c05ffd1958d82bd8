"""Dynamic encoder block of the published DyHead code, for its checkpoints.

The published code passes the offsets of a level without resizing to the convolution on the coarser
neighbour, whose kernel reads their memory as if they had the size of the neighbour. It does not
scale the offsets for the finer neighbour, upsamples with align_corners=True, and includes the
padding in the statistics.
"""

import torch.nn.functional as F
from torch import Tensor

from ..layers import check_levels
from ..structures import Pyramid
from .dynamic_block import DynamicEncoderBlock

__all__ = ["LegacyDynamicEncoderBlock"]


class LegacyDynamicEncoderBlock(DynamicEncoderBlock):
    """Dynamic encoder block of DyHead; its results depend on the padding."""

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Return a pyramid of the same shape, computed as if there were no padding."""
        check_levels(self, self.num_levels, pyramid)
        whole = Pyramid(pyramid.features, pyramid.strides)
        return pyramid.with_features(self.plain_forward(whole).features)

    def _at_finer(
        self, offset: Tensor, mask: Tensor, pyramid: Pyramid, i: int
    ) -> tuple[Tensor, Tensor]:
        return offset, mask

    def _at_coarser(
        self, offset: Tensor, mask: Tensor, pyramid: Pyramid, i: int
    ) -> tuple[Tensor, Tensor]:
        height, width = pyramid.features[i + 1].shape[-2:]

        def read_flat(values: Tensor) -> Tensor:
            channels = values.shape[1]
            flat = values.contiguous().flatten(1)[:, : channels * height * width]
            return flat.view(-1, channels, height, width)

        return read_flat(offset), read_flat(mask)

    def _upsample(self, coarser: Tensor, pyramid: Pyramid, i: int) -> Tensor:
        size = pyramid.features[i].shape[-2:]
        return F.interpolate(coarser, size=size, mode="bilinear", align_corners=True)
