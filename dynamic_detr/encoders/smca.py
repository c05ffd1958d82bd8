"""Encoder of SMCA (section 3.3): self-attention within each level and over all levels."""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import check_arguments
from ..layers import apply_layer, check_levels, sine_positions
from ..structures import Pyramid
from .build import ENCODER_REGISTRY
from .smca_block import SMCAEncoderBlock

__all__ = ["SMCAEncoder"]


@ENCODER_REGISTRY.register()
class SMCAEncoder(nn.Module):
    """Stack of intra-scale and multi-scale self-attention blocks.

    Args:
        channels: C, divisible by 4.
        num_levels: L.
        blocks: kind of each block, "intra" or "multi".
        shared: see `SMCAEncoderBlock`.
        num_heads: attention heads.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: see `SMCAEncoderBlock`.
        checkpoint_blocks: recompute each block in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        blocks: Sequence[str],
        shared: str,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        checkpoint_blocks: bool,
    ) -> None:
        super().__init__()
        check_arguments("MODEL.SMCA_ENCODER", blocks=blocks)
        self.num_levels = num_levels
        self.checkpoint_blocks = checkpoint_blocks
        self.blocks = nn.ModuleList(
            SMCAEncoderBlock(
                channels,
                num_levels,
                kind,
                shared=shared,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
            )
            for kind in blocks
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, encoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.SMCA_ENCODER
        return {
            "channels": detector.HIDDEN_DIM,
            "num_levels": len(detector.IN_FEATURES),
            "checkpoint_blocks": detector.ACTIVATION_CHECKPOINT.ENCODER,
            **{name.lower(): value for name, value in encoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Return a pyramid of the same shape, with zeros in the padding.

        Raises:
            ValueError: the pyramid does not have `num_levels` levels.
        """
        check_levels(self, self.num_levels, pyramid)
        pyramid = pyramid.masked()
        positions = sine_positions(pyramid, pyramid.channels, offset=1).to(pyramid.table().dtype)
        recompute = self.checkpoint_blocks and self.training
        for block in self.blocks:
            pyramid = apply_layer(block, pyramid, positions, recompute=recompute)
        return pyramid.masked()
