"""The encoder of Deformable DETR (section 4.2): every position of a pyramid looks at a few points
of all levels, around itself."""

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import (
    DeformableAttention,
    FeedForward,
    apply_layer,
    check_heads,
    padding_mask,
    sine_positions,
)
from ..structures import Pyramid
from .build import ENCODER_REGISTRY

__all__ = ["DeformableEncoder"]


class DeformableEncoderLayer(nn.Module):
    """Deformable attention of a pyramid to itself, then a feed-forward network.

    Args:
        channels: C.
        num_levels: L.
        multi_scale: whether a position samples all levels, or its own alone.
        num_heads, num_points, ffn_dim, dropout: see `DeformableEncoder`.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        multi_scale: bool,
    ) -> None:
        super().__init__()
        self.multi_scale = multi_scale
        self.attention = DeformableAttention(
            channels, num_heads, num_levels if multi_scale else 1, num_points, dropout
        )
        self.ffn = FeedForward(channels, ffn_dim, dropout)

    def forward(self, table: Tensor, positions: Tensor, pyramid: Pyramid) -> Tensor:
        """One refinement.

        Args:
            table: (B, ΣHW, C), what the layer reads; not the features of the pyramid.
            positions: (B, ΣHW, C).
            pyramid: whose sizes it has.

        Returns:
            (B, ΣHW, C), with anything beyond the true sizes.
        """
        pyramid = pyramid.with_table(table)
        if self.multi_scale:
            return self.ffn(self.attention(table, positions, pyramid.centers(), pyramid))
        areas = [height * width for height, width in pyramid.shapes]
        rows = zip(
            table.split(areas, dim=1),
            positions.split(areas, dim=1),
            pyramid.level_centers(),
            (pyramid.select([level]) for level in range(len(pyramid))),
            strict=True,
        )
        return self.ffn(torch.cat([self.attention(*level) for level in rows], dim=1))


@ENCODER_REGISTRY.register()
class DeformableEncoder(nn.Module):
    """A stack of layers of deformable attention.

    Args:
        channels: C, channels of every level, divisible by 4.
        num_levels: L.
        num_layers: layers in the stack.
        num_heads: attention heads.
        num_points: points that a head samples on each level.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: probability, after attention and both layers of the feed-forward networks.
        multi_scale: whether a position samples all levels, or its own alone.
        checkpoint_layers: in training, keep only the input of each layer and compute it again in
            the backward pass.

    Raises:
        ValueError: an argument is out of its key's range, or the heads do not divide the channels;
            in `forward`, the pyramid has another number of levels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        num_layers: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        multi_scale: bool,
        checkpoint_layers: bool,
    ) -> None:
        super().__init__()
        options = {
            "num_heads": num_heads,
            "num_points": num_points,
            "ffn_dim": ffn_dim,
            "dropout": dropout,
            "multi_scale": multi_scale,
        }
        check_arguments("MODEL.DEFORMABLE_ENCODER", num_layers=num_layers, **options)
        check_heads("MODEL.DEFORMABLE_ENCODER", num_heads, channels)
        self.checkpoint_layers = checkpoint_layers
        self.level_embed = nn.Parameter(torch.empty(num_levels, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, num_levels, **options) for _ in range(num_layers)
        )
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.ffn.linear1.weight)
            nn.init.xavier_uniform_(layer.ffn.linear2.weight)
        nn.init.normal_(self.level_embed)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, encoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.DEFORMABLE_ENCODER
        return {
            "channels": detector.HIDDEN_DIM,
            "num_levels": len(detector.IN_FEATURES),
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.ENCODER,
            **{name.lower(): value for name, value in encoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Pyramid to pyramid of the same shape, with zeros beyond the true sizes."""
        if len(pyramid) != len(self.level_embed):
            raise ValueError(
                f"DeformableEncoder: the pyramid has {len(pyramid)} levels; wants "
                f"{len(self.level_embed)}, its num_levels."
            )
        table, padding = pyramid.masked().table(), padding_mask(pyramid)
        positions = self._positions(pyramid).to(table.dtype)
        recompute = self.checkpoint_layers and self.training
        for layer in self.layers:
            table = apply_layer(layer, table, positions, pyramid, recompute=recompute)
        if padding is not None:
            table = table.masked_fill(padding[..., None], 0)
        return pyramid.with_table(table)

    def _positions(self, pyramid: Pyramid) -> Tensor:
        """Where a row is, within its level and among levels: (B, ΣHW, C)."""
        areas = [height * width for height, width in pyramid.shapes]
        levels = zip(self.level_embed, areas, strict=True)
        level_of_row = torch.cat([embedding.expand(area, -1) for embedding, area in levels])
        return sine_positions(pyramid, pyramid.channels, offset=0.5) + level_of_row
