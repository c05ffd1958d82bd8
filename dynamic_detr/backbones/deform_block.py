"""A ResNet bottleneck whose 3×3 convolution is deformable (Deformable ConvNets v1 and v2).

Detectron2's own block needs a compiled operator; this one uses `dynamic_detr.ops.deform_conv2d`.
The parameters have the same names, shapes and meaning, so weights are interchangeable.
"""

import torch
from detectron2.layers import CNNBlockBase, Conv2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from ..ops import deform_conv2d

__all__ = ["DeformBottleneckBlock", "DeformConv2d"]


class DeformConv2d(Conv2d):
    """Convolution that samples its input at predicted offsets.

    Takes the arguments of Detectron2's `Conv2d`, including `norm` and `activation`. Kernel size,
    stride, padding and dilation must be the same in both directions.

    Args:
        deform_groups: number of groups of input channels; each group has its own offsets.

    Raises:
        ValueError: the input channels or the convolution groups do not divide evenly.
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
        """Sample, convolve, then apply `norm` and `activation` if given.

        Args:
            x: feature map (B, C, H, W).
            offset: offsets (B, deform_groups · 2·kh·kw, H_out, W_out) in pixels of `x`, ordered by
                group, then kernel position, then (y, x).
            mask: modulation (B, deform_groups · kh·kw, H_out, W_out), ordered by group, then
                kernel position; None means all ones.

        Returns:
            Feature map (B, C_out, H_out, W_out).
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
        # The operator has one set of offsets, so each deformable group is a call of its own.
        inputs = x.chunk(parts, dim=1)
        offsets = offset.chunk(parts, dim=1)
        masks = [None] * parts if mask is None else mask.chunk(parts, dim=1)
        groups = max(self.groups // parts, 1)
        outputs = [
            deform_conv2d(*sampled, weight, None, *geometry, groups)
            for *sampled, weight in zip(inputs, offsets, masks, self._split_weight(), strict=True)
        ]
        # Deformable groups within one convolution group contribute to the same output channels.
        together = max(parts // self.groups, 1)
        sums = [sum(outputs[i : i + together]) for i in range(0, parts, together)]
        out = torch.cat(sums, dim=1)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def _split_weight(self) -> list[Tensor]:
        """Return the part of the weight that applies to each deformable group."""
        if self.groups >= self.deform_groups:  # a deformable group holds whole groups
            return list(self.weight.chunk(self.deform_groups, dim=0))
        together = self.deform_groups // self.groups  # a group holds whole deformable groups
        return [
            part
            for weight in self.weight.chunk(self.groups, dim=0)
            for part in weight.chunk(together, dim=1)
        ]


class DeformBottleneckBlock(CNNBlockBase):
    """Bottleneck block with a deformable 3×3 convolution.

    A 3×3 convolution predicts offsets and modulation. It starts at zero: the block then computes
    the plain bottleneck, except that modulation halves the output of the 3×3 convolution.

    Args:
        block: the plain bottleneck; its parameters and norms are reused, also if they are frozen.
        deform_modulated: scale every sample by a predicted weight in [0, 1] (v2) or not (v1).
        deform_num_groups: number of deformable groups of input channels, each with its own offsets.

    Raises:
        ValueError: see `DeformConv2d`.
    """

    def __init__(
        self, block: BottleneckBlock, *, deform_modulated: bool = False, deform_num_groups: int = 1
    ):
        super().__init__(block.in_channels, block.out_channels, block.stride)
        self.deform_modulated = deform_modulated
        plain = block.conv2
        geometry = {
            "kernel_size": plain.kernel_size,
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        self.shortcut = block.shortcut
        self.conv1 = block.conv1
        self.conv2 = DeformConv2d(
            plain.in_channels,
            plain.out_channels,
            **geometry,
            bias=False,
            groups=plain.groups,
            norm=plain.norm,
            deform_groups=deform_num_groups,
        )
        self.conv2.weight = plain.weight
        self.conv3 = block.conv3
        # Channels: (y, x) offsets of the 9 kernel positions for every group, then the modulation.
        channels = (27 if deform_modulated else 18) * deform_num_groups
        self.conv2_offset = Conv2d(plain.in_channels, channels, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2_offset.requires_grad_(plain.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        out = self.conv1(x).relu_()
        offset, mask = self._predict_offsets(out)
        out = self.conv2(out, offset, mask).relu_()
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return out.relu_()

    def _predict_offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        predicted = self.conv2_offset(x)
        # The sigmoid is computed in float32, like the operator's positions.
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        if not self.deform_modulated:
            return predicted, None
        taps = predicted.shape[1] // 3
        offset, mask = predicted.split([2 * taps, taps], dim=1)
        return offset, mask.sigmoid()
