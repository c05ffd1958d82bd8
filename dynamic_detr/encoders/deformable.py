"""Encoder of Deformable DETR (section 4.2): deformable self-attention over a pyramid."""

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import (
    DeformableAttention,
    FeedForward,
    apply_layer,
    check_heads,
    check_levels,
    sine_positions,
)
from ..structures import Pyramid
from .build import ENCODER_REGISTRY

__all__ = ["DeformableEncoder"]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network; see `DeformableEncoder`."""

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
        """Apply the layer.

        Args:
            table: (B, ΣHW, C) features of all levels, flattened and concatenated.
            positions: (B, ΣHW, C) position embeddings, added to the features for the queries.
            pyramid: pyramid with the sizes of the table; its features are not read.

        Returns:
            (B, ΣHW, C), undefined in the padding.
        """
        pyramid = pyramid.with_table(table)
        if self.multi_scale:
            return self.ffn(self.attention(table, positions, pyramid.centers(), pyramid))
        rows = zip(
            table.split(pyramid.areas, dim=1),
            positions.split(pyramid.areas, dim=1),
            pyramid.level_centers(),
            (pyramid.select([level]) for level in range(len(pyramid))),
            strict=True,
        )
        return self.ffn(torch.cat([self.attention(*level) for level in rows], dim=1))


@ENCODER_REGISTRY.register()
class DeformableEncoder(nn.Module):
    """Stack of deformable attention layers.

    Args:
        channels: C, divisible by 4.
        num_levels: L.
        num_layers: number of layers.
        num_heads: attention heads.
        num_points: sampled points per head and level.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: probability, after attention and both layers of the feed-forward networks.
        multi_scale: True to sample all levels, False to sample only the level of the query.
        checkpoint_layers: recompute each layer in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
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
        """Return a pyramid of the same shape, with zeros in the padding.

        Raises:
            ValueError: the pyramid does not have `num_levels` levels.
        """
        check_levels(self, len(self.level_embed), pyramid)
        table = pyramid.masked().table()
        positions = self._positions(pyramid).to(table.dtype)
        recompute = self.checkpoint_layers and self.training
        for layer in self.layers:
            table = apply_layer(layer, table, positions, pyramid, recompute=recompute)
        return pyramid.with_table(table).masked()

    def _positions(self, pyramid: Pyramid) -> Tensor:
        """Return the sum of position and level embeddings, (B, ΣHW, C)."""
        levels = zip(self.level_embed, pyramid.areas, strict=True)
        level_of_row = torch.cat([embedding.expand(area, -1) for embedding, area in levels])
        return sine_positions(pyramid, pyramid.channels, offset=0.5) + level_of_row
