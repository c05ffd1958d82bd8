"""One block of the dynamic encoder:

    level' = DyReLU( mean over neighbours k of  s_k · GN_k( DCN_k(·) ) )

The neighbours of a level are the finer level, the level itself and the coarser level. Each level
predicts one set of offsets and modulations for its three deformable convolutions DCN_k (equation
4). The scale weight s_k is predicted from the mean of the k-th result (equation 5). The DyReLU
(equation 6) of the weighted mean is the new level (equation 7). Section 3.2 and equation 3 have the
sum, Dynamic Head's code the mean of the neighbours that exist. All levels share the weights of the
block.

`plain_forward` computes this operation by operation. `forward` computes the same, with one fused
operator for everything after the convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import check_levels
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
        """Map features (B, C, H, W) to (B, C, Ho, Wo); the norm ignores the padding.

        Args:
            features: (B, C, H, W).
            offset: (B, 18, Ho, Wo) in pixels of the features; None for a plain convolution.
            mask: (B, 9, Ho, Wo) modulation; None without offsets.
            valid: (B, 1, Ho, Wo) bool, False in the padding.
        """
        out = self.convolve(features, offset, mask) + self.conv.bias[:, None, None]
        return _group_norm(out, self.norm, valid)

    def convolve(self, features: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the convolution without its bias; see `forward` for the arguments."""
        weight, stride = self.conv.weight, self.conv.stride[0]
        if offset is None:
            return F.conv2d(features, weight, None, stride, padding=1)
        return deform_conv2d(features, offset, mask, weight, None, stride, padding=1)


class DynamicEncoderBlock(nn.Module):
    """Convolutions between neighbouring levels with scale, spatial and channel attention.

    An offset is a displacement in pixels of the level that predicts it. For a neighbour it is
    multiplied by the ratio of the strides, so all three convolutions sample the same place of the
    image. For the grid of the coarser neighbour, offsets and modulations are averaged over the true
    pixels of each 2×2 block.

    The three switches are the ablations of DyHead's Table 1.

    Args:
        channels: C.
        num_groups: groups of each GroupNorm.
        num_levels: L; None for any number. With one level the block has no parameters for the
            neighbours, which would never get a gradient.
        scale_attention: weigh the neighbours by equation 5; if False, equally.
        spatial_attention: sample at predicted offsets; if False, the convolutions are plain.
        channel_attention: DyReLU activation; if False, ReLU.
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
        """Compute equations 4 to 7 operation by operation: the reference for `forward`."""
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
        """Return a pyramid of the same shape, with zeros in the padding.

        Args:
            pyramid: pyramid with zeros in the padding.

        Raises:
            ValueError: the pyramid does not have `num_levels` levels.
        """
        check_levels(self, self.num_levels, pyramid)
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

    def _sampling(self, pyramid: Pyramid, i: int) -> dict[str, Sampling]:
        """Return the inputs of the convolutions of level i, by existing neighbour.

        Offset and modulation are None without spatial attention.
        """
        features, offset, mask = pyramid.features, None, None
        if self.offset is not None:
            predicted = self.offset(features[i])
            # the sigmoid and the averages are computed in float32, like the operator's positions
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
        """Return offset and modulation of level i for the convolution on its finer neighbour.

        The output grid of that convolution, of stride 2, is the grid of level i.
        """
        return offset * (pyramid.strides[i] / pyramid.strides[i - 1]), mask

    def _at_coarser(
        self, offset: Tensor, mask: Tensor, pyramid: Pyramid, i: int
    ) -> tuple[Tensor, Tensor]:
        """Return offset and modulation of level i for the convolution on its coarser neighbour."""
        ratio = pyramid.strides[i] / pyramid.strides[i + 1]
        both = torch.cat([offset * ratio, mask], dim=1)
        if pyramid.is_unpadded(i):
            halved = _mean_of_blocks(both)
        else:  # 0 where a block has no true pixel
            valid = pyramid.valid_mask(i).to(both.dtype)
            halved = _mean_of_blocks(both * valid) / _mean_of_blocks(valid).clamp(min=0.25)
        return halved[:, : 2 * TAPS], halved[:, 2 * TAPS :]

    def _upsample(self, coarser: Tensor, pyramid: Pyramid, i: int) -> Tensor:
        """Upsample the map of the coarser neighbour twofold to the shape of level i.

        The last true row and column are first repeated into the padding, so that interpolation
        reads no padding.
        """
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
    """Return the mean over the true pixels, (B, C)."""
    wide = torch.promote_types(features.dtype, torch.float32)
    mean = features.where(valid, 0).sum(dim=(2, 3), dtype=wide) / valid.sum(dim=(2, 3))
    return mean.to(features.dtype)


def _group_norm(features: Tensor, norm: nn.GroupNorm, valid: Tensor) -> Tensor:
    """Apply the norm with the statistics of the true pixels; `F.group_norm` takes no mask."""
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
    """Return the mean of each 2×2 block; at an odd edge, of the pixels that exist."""
    return F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)
