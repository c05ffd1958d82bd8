"""A ResNet bottleneck whose 3×3 convolution is deformable (Deformable ConvNets v1 and v2).

Detectron2 has the same block on an operator that must be compiled. This one runs on
`dynamic_detr.ops.deform_conv2d`; its parameters have the same names, shapes and meaning, so that
weights go from one to the other.
"""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..ops import deform_conv2d

__all__ = ["DeformBottleneckBlock", "DeformConv2d"]


class DeformConv2d(Conv2d):
    """A convolution that samples its input at displaced positions.

    Takes the arguments of Detectron2's `Conv2d` (`norm` and `activation` too); kernel, stride,
    padding and dilation are the same in both directions.

    Args:
        deform_groups: number of groups of input channels; each group has offsets of its own.

    Raises:
        ValueError: the input channels, or the groups, cannot be divided as asked.
    """

    def __init__(self, *args, deform_groups: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.deform_groups = deform_groups
        if deform_groups < 1 or self.in_channels % deform_groups:
            raise ValueError(
                f"DeformConv2d: {self.in_channels} input channels cannot be split into "
                f"{deform_groups} deformable groups (MODEL.RESNETS.DEFORM_NUM_GROUPS)."
            )
        if self.groups % deform_groups and deform_groups % self.groups:
            raise ValueError(
                f"DeformConv2d: of {self.groups} groups (MODEL.RESNETS.NUM_GROUPS) and "
                f"{deform_groups} deformable groups (MODEL.RESNETS.DEFORM_NUM_GROUPS), one number "
                "must divide the other."
            )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (B, C, H, W).
            offset: (B, deform_groups · 2·kh·kw, Ho, Wo), by group, then tap, then (y, x), in
                pixels of `x`.
            mask: (B, deform_groups · kh·kw, Ho, Wo), modulation by group, then tap; None for
                all ones.

        Returns:
            (B, C_out, Ho, Wo), after `norm` and `activation` where there are any.
        """
        x = self._convolve(x, offset, mask)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        parts = self.deform_groups
        geometry = (self.stride[0], self.padding[0], self.dilation[0])
        if parts == 1:
            return deform_conv2d(x, offset, mask, self.weight, self.bias, *geometry, self.groups)
        # Every deformable group is one call on its own channels.
        inputs = x.chunk(parts, dim=1)
        offsets = offset.chunk(parts, dim=1)
        masks = [None] * parts if mask is None else mask.chunk(parts, dim=1)
        groups = max(self.groups // parts, 1)
        outputs = [
            deform_conv2d(*sampled, weight, None, *geometry, groups)
            for *sampled, weight in zip(inputs, offsets, masks, self._weight_parts(), strict=True)
        ]
        # Those that lie in one group of the convolution add up, those of different groups do not.
        together = max(parts // self.groups, 1)
        sums = [sum(outputs[i : i + together]) for i in range(0, parts, together)]
        out = torch.cat(sums, dim=1)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def _weight_parts(self) -> list[Tensor]:
        """The weight that each deformable group's input channels meet."""
        if self.groups >= self.deform_groups:  # a deformable group holds whole groups
            return list(self.weight.chunk(self.deform_groups, dim=0))
        together = self.deform_groups // self.groups  # a group holds whole deformable groups
        return [
            part
            for weight in self.weight.chunk(self.groups, dim=0)
            for part in weight.chunk(together, dim=1)
        ]


class DeformBottleneckBlock(BottleneckBlock):
    """A bottleneck 1×1, deformable 3×3, 1×1; offsets and modulations come from a 3×3 convolution.

    `conv2_offset` starts at zero: the block then is the plain one, with the output of its 3×3
    convolution halved where it is modulated (the sigmoid of zero).

    Args:
        in_channels, out_channels, bottleneck_channels, stride, num_groups, norm, stride_in_1x1,
            dilation: as in Detectron2's `BottleneckBlock`.
        deform_modulated: scale every sample by a predicted weight in [0, 1] (v2) or not (v1).
        deform_num_groups: groups of channels that have their own offsets.

    Raises:
        ValueError: see `DeformConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm="BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.deform_modulated = deform_modulated
        geometry = {
            "kernel_size": 3,
            "stride": self.conv2.stride,
            "padding": dilation,
            "dilation": dilation,
        }
        self.conv2 = DeformConv2d(
            bottleneck_channels,
            bottleneck_channels,
            **geometry,
            bias=False,
            groups=num_groups,
            norm=self.conv2.norm,
            deform_groups=deform_num_groups,
        )
        weight_init.c2_msra_fill(self.conv2)
        # Channels: for all groups (y, x) of each of the 9 taps, then all groups' modulations.
        channels = (27 if deform_modulated else 18) * deform_num_groups
        self.conv2_offset = Conv2d(bottleneck_channels, channels, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        out = self.conv1(x).relu_()
        offset, mask = self._predict_offsets(out)
        out = self.conv2(out, offset, mask).relu_()
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return out.relu_()

    def _predict_offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        predicted = self.conv2_offset(x)
        # a position in half precision would be off by a large part of a pixel
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        if not self.deform_modulated:
            return predicted, None
        taps = predicted.shape[1] // 3
        offset, mask = predicted.split([2 * taps, taps], dim=1)
        return offset, mask.sigmoid()
