"""The dynamic encoder (equations 2 to 7): self-attention over a pyramid, approximated by
deformable convolutions between neighbouring levels with scale, spatial and channel attention."""

from detectron2.config import CfgNode, configurable
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..structures import Pyramid
from .build import ENCODER_REGISTRY
from .dynamic_block import DynamicEncoderBlock
from .legacy_block import LegacyDynamicEncoderBlock

__all__ = ["DynamicEncoder"]

BLOCKS = {"resized": DynamicEncoderBlock, "legacy": LegacyDynamicEncoderBlock}


@ENCODER_REGISTRY.register()
class DynamicEncoder(nn.Module):
    """A stack of dynamic encoder blocks.

    Args:
        channels: C, channels of every level.
        num_blocks: blocks in the stack (the paper's Table 2: 2, 4 or 6).
        num_groups: groups of each GroupNorm.
        offsets: "resized", offsets are displacements in the image and are resized for the
            neighbouring levels; or "legacy", as the published DyHead code reads them, for its
            checkpoints (not invariant to padding).
        checkpoint_blocks: in training, keep only the input of each block and compute it again in
            the backward pass.

    Raises:
        ValueError: offsets is neither, or the channels do not divide into the groups.
    """

    @configurable
    def __init__(
        self,
        channels: int = 256,
        num_blocks: int = 6,
        num_groups: int = 16,
        offsets: str = "resized",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if offsets not in BLOCKS:
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.ENCODER.OFFSETS is {offsets!r}; wants one of {sorted(BLOCKS)}."
            )
        if channels % num_groups:
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.ENCODER.NUM_GROUPS is {num_groups}; it must divide "
                f"MODEL.DYNAMIC_DETR.HIDDEN_DIM, which is {channels}."
            )
        block = BLOCKS[offsets]
        self.blocks = nn.ModuleList(block(channels, num_groups) for _ in range(num_blocks))
        self.masks_padding = offsets != "legacy"
        self.checkpoint_blocks = checkpoint_blocks

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.DYNAMIC_DETR
        return {
            "channels": node.HIDDEN_DIM,
            "num_blocks": node.ENCODER.NUM_BLOCKS,
            "num_groups": node.ENCODER.NUM_GROUPS,
            "offsets": node.ENCODER.OFFSETS,
            "checkpoint_blocks": node.CHECKPOINT.ENCODER_BLOCKS,
        }

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Pyramid to pyramid of the same shape; with zeros beyond the true sizes unless legacy."""
        if self.masks_padding:
            pyramid = pyramid.masked()
        recompute = self.checkpoint_blocks and self.training
        for block in self.blocks:
            if recompute:
                pyramid = checkpoint(block, pyramid, use_reentrant=False)
            else:
                pyramid = block(pyramid)
        return pyramid
