"""Dynamic encoder (equations 2 to 7).

Deformable convolutions between neighbouring levels, with scale, spatial and channel attention,
approximate self-attention over a pyramid.
"""

from functools import partial

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

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
        layers = list(self.blocks)
        if self.residual_scales is not None:
            pairs = zip(self.blocks, self.residual_scales, strict=True)
            layers = [partial(_residual, block, scale) for block, scale in pairs]
        for layer in layers:
            pyramid = apply_layer(layer, pyramid, recompute=recompute)
        return pyramid


def _residual(block: nn.Module, scale: Tensor, pyramid: Pyramid) -> Pyramid:
    """Return pyramid + scale · block(pyramid) in the dtype of the block's output."""
    levels = []
    for x, y in zip(pyramid.features, block(pyramid).features, strict=True):
        levels.append(x.to(y.dtype) + scale.to(y.dtype)[:, None, None] * y)
    return pyramid.with_features(levels)
