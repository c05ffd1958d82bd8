"""Dynamic encoder (equations 2 to 7).

Deformable convolutions between neighbouring levels, with scale, spatial and channel attention,
approximate self-attention over a pyramid.
"""

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import check_arguments
from ..layers import apply_layer
from ..structures import Pyramid
from .build import ENCODER_REGISTRY
from .dynamic_block import DynamicEncoderBlock
from .legacy_block import LegacyDynamicEncoderBlock

__all__ = ["DynamicEncoder"]

BLOCKS = {"resized": DynamicEncoderBlock, "legacy": LegacyDynamicEncoderBlock}


@ENCODER_REGISTRY.register()
class DynamicEncoder(nn.Module):
    """Stack of dynamic encoder blocks.

    Args:
        channels: C.
        num_levels: L; None for any number of two or more. With one level the blocks have no
            convolutions for neighbouring levels.
        num_blocks: number of blocks.
        num_groups: groups of each GroupNorm, a divisor of C.
        offsets: "resized" to resize the offsets for the neighbouring levels, or "legacy" to read
            them like the published DyHead code, for its checkpoints; see
            `LegacyDynamicEncoderBlock`.
        scale_attention: see `DynamicEncoderBlock`.
        spatial_attention: see `DynamicEncoderBlock`.
        channel_attention: see `DynamicEncoderBlock`.
        residual: add the output of each block to its input, multiplied by a learned scale of each
            channel. The scales start at 0, so that the encoder starts as the identity. This is not
            in the paper.
        checkpoint_blocks: recompute each block in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the groups do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_levels: int | None,
        *,
        num_blocks: int,
        num_groups: int,
        offsets: str,
        scale_attention: bool,
        spatial_attention: bool,
        channel_attention: bool,
        residual: bool,
        checkpoint_blocks: bool,
    ) -> None:
        super().__init__()
        attentions = {
            "scale_attention": scale_attention,
            "spatial_attention": spatial_attention,
            "channel_attention": channel_attention,
        }
        check_arguments(
            "MODEL.DYNAMIC_ENCODER",
            num_blocks=num_blocks,
            num_groups=num_groups,
            offsets=offsets,
            residual=residual,
            **attentions,
        )
        if channels % num_groups:
            raise ValueError(
                f"MODEL.DYNAMIC_ENCODER.NUM_GROUPS is {num_groups}; it must divide the number of "
                f"channels, {channels}."
            )
        block = BLOCKS[offsets]
        self.blocks = nn.ModuleList(
            block(channels, num_groups, num_levels, **attentions) for _ in range(num_blocks)
        )
        self.residual_scales = None
        if residual:
            self.residual_scales = nn.ParameterList(torch.zeros(channels) for _ in self.blocks)
        self.masks_padding = offsets != "legacy"
        self.checkpoint_blocks = checkpoint_blocks

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, encoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.DYNAMIC_ENCODER
        return {
            "channels": detector.HIDDEN_DIM,
            "num_levels": len(detector.IN_FEATURES),
            "checkpoint_blocks": detector.ACTIVATION_CHECKPOINT.ENCODER,
            **{name.lower(): value for name, value in encoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Return a pyramid of the same shape, with zeros in the padding except for "legacy"."""
        if self.masks_padding:
            pyramid = pyramid.masked()
        recompute = self.checkpoint_blocks and self.training
        for i, block in enumerate(self.blocks):
            output = apply_layer(block, pyramid, recompute=recompute)
            if self.residual_scales is not None:
                scale = self.residual_scales[i][:, None, None]
                pairs = zip(pyramid.features, output.features, strict=True)
                output = pyramid.with_features([x + scale * y for x, y in pairs])
            pyramid = output
        return pyramid
