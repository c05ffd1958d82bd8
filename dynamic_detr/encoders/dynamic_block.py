"""One block of the dynamic encoder:

    level' = DyReLU( mean over neighbours k of  s_k · GN_k( DCN_k(·) ) )

The neighbours of a level are the finer level, the level itself and the coarser one. Offsets and
modulations are predicted once, from the level itself, for the three deformable convolutions DCN_k
(equation 4); s_k weighs each result by its mean (equation 5), and the DyReLU (equation 6) of their
mean is the new level (equation 7). The weights of the block are shared by all levels.

`plain_forward` says this operation by operation. `forward` computes the same, and leaves everything
behind the convolutions to one operator that reads each map as seldom as possible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import FusionWeights, deform_conv2d, fuse_levels
from ..structures import Pyramid
from .dyrelu import DyReLU, hard_sigmoid

__all__ = ["DynamicEncoderBlock"]

TAPS = 9  # of a 3×3 kernel

Sampling = tuple[Tensor, Tensor | None, Tensor | None]  # features, offset, modulation


class NormedDeformConv(nn.Module):
    """GN_k( DCN_k(·) ): a modulated deformable 3×3 convolution and its GroupNorm."""

    def __init__(self, channels: int, num_groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(num_groups, channels)
        nn.init.zeros_(self.conv.bias)

    def forward(
        self, features: Tensor, offset: Tensor | None, mask: Tensor | None, valid: Tensor
    ) -> Tensor:
        """(B, C, H, W) features to (B, C, Ho, Wo), normalised over the true pixels, those where
        `valid` (B, 1, Ho, Wo) is True."""
        out = self.convolve(features, offset, mask) + self.conv.bias[:, None, None]
        return _group_norm(out, self.norm, valid)

    def convolve(self, features: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        """The convolution without its bias; a plain one where there are no offsets."""
        weight, stride = self.conv.weight, self.conv.stride[0]
        if offset is None:
            return F.conv2d(features, weight, None, stride, padding=1)
        return deform_conv2d(features, offset, mask, weight, None, stride, padding=1)


class DynamicEncoderBlock(nn.Module):
    """Pyramid to pyramid of the same shape.

    An offset is a displacement in pixels of the level that predicts it. At a neighbour it is
    multiplied by the ratio of the strides, so that all three convolutions look at the same place
    in the image; for the grid of the coarser neighbour, offsets and modulations are averaged over
    the true pixels of each 2×2 block.

    Args:
        channels: C.
        num_groups: groups of each GroupNorm.
        num_levels: levels of every pyramid that comes; None for any number. A block for one level
            has no parameters for neighbours, which would never get a gradient.
        scale_attention: weigh the neighbours by equation 5, and not all alike.
        spatial_attention: sample at predicted offsets, and not on the grid of a plain convolution.
        channel_attention: activate by the DyReLU, and not by a ReLU. (The three are the ablations
            of DyHead's Table 1.)
    """

    def __init__(
        self,
        channels: int,
        num_groups: int,
        num_levels: int | None = None,
        scale_attention: bool = True,
        spatial_attention: bool = True,
        channel_attention: bool = True,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.offset = nn.Conv2d(channels, 3 * TAPS, 3, padding=1) if spatial_attention else None
        self.coarser, self.finer = None, None
        if num_levels != 1:
            self.coarser = NormedDeformConv(channels, num_groups, stride=1)
        self.same = NormedDeformConv(channels, num_groups, stride=1)
        if num_levels != 1:
            self.finer = NormedDeformConv(channels, num_groups, stride=2)
        self.scale = nn.Linear(channels, 1) if scale_attention else None
        self.dyrelu = DyReLU(channels) if channel_attention else None
        if self.offset is not None:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)
        if self.scale is not None:
            nn.init.normal_(self.scale.weight, std=0.01)
            nn.init.zeros_(self.scale.bias)

    def plain_forward(self, pyramid: Pyramid) -> Pyramid:
        """Equations 4 to 7, operation by operation: what `forward` computes in fewer steps."""
        levels = []
        for i in range(len(pyramid)):
            valid, sampling = pyramid.valid_mask(i), self._sampling(pyramid, i)
            maps = [self.same(*sampling["same"], valid)]  # equation 4
            if "finer" in sampling:
                maps.append(self.finer(*sampling["finer"], valid))
            if "coarser" in sampling:
                coarser = self.coarser(*sampling["coarser"], pyramid.valid_mask(i + 1))
                maps.append(self._upsample(coarser, pyramid, i))
            if self.scale is not None:  # equation 5
                scores = [F.relu(self.scale(_mean(m, valid))) for m in maps]
                weights = [hard_sigmoid(score)[:, :, None, None] for score in scores]
                maps = [weight * m for weight, m in zip(weights, maps, strict=True)]
            level = sum(maps) / len(maps)
            if self.dyrelu is not None:  # equation 6
                level = self.dyrelu(level, _mean(level, valid))
            else:
                level = level.relu()
            levels.append(level.where(valid, 0))
        return pyramid.with_features(levels)  # equation 7

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Features beyond the true sizes are taken to be zero, and are zero in the result.

        Raises:
            ValueError: the pyramid has not num_levels levels.
        """
        self._check(pyramid)
        maps = [
            {
                neighbour: getattr(self, neighbour).convolve(*arguments)
                for neighbour, arguments in self._sampling(pyramid, i).items()
            }
            for i in range(len(pyramid))
        ]
        levels = fuse_levels(
            [level["same"] for level in maps],
            [level["finer"] for level in maps[1:]],
            [level["coarser"] for level in maps[:-1]],
            [pyramid.sizes(i) for i in range(len(pyramid))],
            self._fusion_weights(),
            self.same.norm.num_groups,
            self.same.norm.eps,
        )
        return pyramid.with_features(levels)

    def _check(self, pyramid: Pyramid) -> None:
        if self.num_levels not in (None, len(pyramid)):
            raise ValueError(
                f"{type(self).__name__}: pyramid has {len(pyramid)} levels; "
                f"wants num_levels, which is {self.num_levels}."
            )

    def _sampling(self, pyramid: Pyramid, i: int) -> dict[str, Sampling]:
        """What the convolutions of level i sample: the features of each neighbour that there is,
        and where; None for both offset and modulation where the grid is sampled."""
        features, offset, mask = pyramid.features, None, None
        if self.offset is not None:
            predicted = self.offset(features[i])
            # a position in half precision would be off by a large part of a pixel
            predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            offset, mask = predicted[:, : 2 * TAPS], predicted[:, 2 * TAPS :].sigmoid()
        sampling = {"same": (features[i], offset, mask)}
        if i > 0:
            at = (None, None) if offset is None else self._at_finer(offset, mask, pyramid, i)
            sampling["finer"] = (features[i - 1], *at)
        if i + 1 < len(features):
            at = (None, None) if offset is None else self._at_coarser(offset, mask, pyramid, i)
            sampling["coarser"] = (features[i + 1], *at)
        return sampling

    def _at_finer(
        self, offset: Tensor, mask: Tensor, pyramid: Pyramid, i: int
    ) -> tuple[Tensor, Tensor]:
        """Offset and modulation of level i for the grid of the convolution on its finer neighbour,
        which is that of the level."""
        return offset * (pyramid.strides[i] / pyramid.strides[i - 1]), mask

    def _at_coarser(
        self, offset: Tensor, mask: Tensor, pyramid: Pyramid, i: int
    ) -> tuple[Tensor, Tensor]:
        """The same for the coarser neighbour."""
        ratio = pyramid.strides[i] / pyramid.strides[i + 1]
        both = torch.cat([offset * ratio, mask], dim=1)
        if pyramid.is_unpadded(i):
            halved = _mean_of_blocks(both)
        else:  # 0 where a block has no true pixel
            valid = pyramid.valid_mask(i).to(both.dtype)
            halved = _mean_of_blocks(both * valid) / _mean_of_blocks(valid).clamp(min=0.25)
        return halved[:, : 2 * TAPS], halved[:, 2 * TAPS :]

    def _upsample(self, coarser: Tensor, pyramid: Pyramid, i: int) -> Tensor:
        """The map of level i's coarser neighbour at level i: twofold, its last true row and column
        continued, cropped."""
        last = (pyramid.sizes(i + 1) - 1)[:, :, None]  # (B, 2, 1)
        y, x = (torch.arange(n, device=coarser.device) for n in coarser.shape[-2:])
        y, x = torch.minimum(y, last[:, 0]), torch.minimum(x, last[:, 1])
        image = torch.arange(len(coarser), device=coarser.device)[:, None, None]
        continued = coarser.permute(0, 2, 3, 1)[image, y[:, :, None], x[:, None]]
        doubled = F.interpolate(
            continued.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
        )
        height, width = pyramid.features[i].shape[-2:]
        return doubled[:, :, :height, :width]

    def _fusion_weights(self) -> FusionWeights:
        branches = [b for b in (self.same, self.finer, self.coarser) if b is not None]
        scale = (None, None) if self.scale is None else self.scale.parameters()
        dyrelu = () if self.dyrelu is None else self.dyrelu.parameters()
        return FusionWeights(
            torch.stack([branch.conv.bias for branch in branches]),
            torch.stack([branch.norm.weight for branch in branches]),
            torch.stack([branch.norm.bias for branch in branches]),
            *scale,
            *dyrelu,
        )


def _mean(features: Tensor, valid: Tensor) -> Tensor:
    """(B, C), over the true pixels."""
    wide = torch.promote_types(features.dtype, torch.float32)
    mean = features.where(valid, 0).sum(dim=(2, 3), dtype=wide) / valid.sum(dim=(2, 3))
    return mean.to(features.dtype)


def _group_norm(features: Tensor, norm: nn.GroupNorm, valid: Tensor) -> Tensor:
    """The norm with statistics of the true pixels."""
    groups = features.to(torch.promote_types(features.dtype, torch.float32))
    groups = groups.unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, H, W)
    pixels, count = valid[:, None], valid.sum(dim=(1, 2, 3)) * groups.shape[2]

    def mean(values: Tensor) -> Tensor:
        total = values.where(pixels, 0).sum(dim=(2, 3, 4)) / count[:, None]
        return total[:, :, None, None, None]

    centred = groups - mean(groups)
    normed = (centred * torch.rsqrt(mean(centred.square()) + norm.eps)).flatten(1, 2)
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    return (normed * weight + bias).to(features.dtype)


def _mean_of_blocks(values: Tensor) -> Tensor:
    """The mean of each 2×2 block, of what there is of it at an odd edge."""
    return F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)
