"""The multi-scale encoder of SMCA (SMCA, section 3.3): blocks of self-attention within each level,
which are cheap, and over all levels, which lets them exchange what they know."""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import check_arguments
from ..layers import apply_layer, padding_mask, sine_positions
from ..structures import Pyramid
from .build import ENCODER_REGISTRY
from .smca_block import SMCAEncoderBlock

__all__ = ["SMCAEncoder"]


@ENCODER_REGISTRY.register()
class SMCAEncoder(nn.Module):
    """A stack of intra-scale and multi-scale self-attention blocks.

    Args:
        channels: C, divisible by 4.
        num_levels: L.
        blocks: kind of each block, "intra" or "multi".
        checkpoint_blocks: in training, keep only the input of each block and compute it again in
            the backward pass.
        shared, num_heads, ffn_dim, dropout: see `SMCAEncoderBlock`.

    Raises:
        ValueError: an argument is out of its key's range, or the heads do not divide the channels.
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
        """Pyramid to pyramid of the same shape, with zeros beyond the true sizes.

        Raises:
            ValueError: the pyramid has another number of levels.
        """
        if len(pyramid) != self.num_levels:
            raise ValueError(
                f"SMCAEncoder: got {len(pyramid)} levels; wants num_levels, {self.num_levels}."
            )
        pyramid, padding = pyramid.masked(), padding_mask(pyramid)
        positions = sine_positions(pyramid, pyramid.channels, offset=1).to(pyramid.table().dtype)
        recompute = self.checkpoint_blocks and self.training
        for block in self.blocks:
            pyramid = apply_layer(block, pyramid, positions, recompute=recompute)
        if padding is None:
            return pyramid
        return pyramid.with_table(pyramid.table().masked_fill(padding[..., None], 0))
