"""Block of SMCA's encoder (section 3.3): self-attention and a feed-forward network."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import FeedForward, check_heads, padding_mask
from ..structures import Pyramid

__all__ = ["SMCAEncoderBlock"]


class PerLevel(nn.Module):
    """Position-wise module with one copy for all levels or one copy per level.

    Args:
        make: builds a module from (B, N, C) to (B, N, ...).
        copies: 1 if the levels share the module, else L.
    """

    def __init__(self, make: Callable[[], nn.Module], copies: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(make() for _ in range(copies))

    def forward(self, table: Tensor, areas: list[int]) -> Tensor:
        """Map flattened features (B, ΣHW, C) to (B, ΣHW, ...); `areas` are H·W of each level."""
        if len(self.levels) == 1:
            return self.levels[0](table)
        parts = zip(self.levels, table.split(areas, dim=1), strict=True)
        return torch.cat([module(part) for module, part in parts], dim=1)


class SMCAEncoderBlock(nn.Module):
    """Post-norm self-attention and feed-forward network over a pyramid.

    Args:
        channels: C.
        num_levels: L.
        kind: "intra" to attend within each level, "multi" to attend to all levels.
        shared: weights that the levels share: "all", "ffn", "attention" or "nothing".
        num_heads: attention heads.
        ffn_dim: hidden units of the feed-forward network.
        dropout: probability, for the attention weights, after attention and after both layers of
            the feed-forward network.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        kind: str,
        *,
        shared: str,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.SMCA_ENCODER",
            blocks=[kind],
            shared=shared,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            dropout=dropout,
        )
        check_heads("MODEL.SMCA_ENCODER", num_heads, channels)
        self.kind = kind
        self.num_heads = num_heads
        attentions = 1 if shared in ("all", "attention") else num_levels
        ffns = 1 if shared in ("all", "ffn") else num_levels
        self.query_key = PerLevel(lambda: nn.Linear(channels, 2 * channels), attentions)
        self.value = PerLevel(lambda: nn.Linear(channels, channels), attentions)
        self.output = PerLevel(lambda: nn.Linear(channels, channels), attentions)
        self.norm = PerLevel(lambda: nn.LayerNorm(channels), attentions)
        self.ffn = PerLevel(lambda: FeedForward(channels, ffn_dim, dropout), ffns)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pyramid: Pyramid, positions: Tensor) -> Pyramid:
        """Return a pyramid of the same shape, undefined in the padding.

        Args:
            pyramid: pyramid with finite values in the padding.
            positions: (B, ΣHW, C), added to the features for queries and keys.
        """
        areas = pyramid.areas
        attended = self.output(self._attend(pyramid, positions), areas)
        table = self.norm(pyramid.table() + self.dropout(attended), areas)
        return pyramid.with_table(self.ffn(table, areas))

    def _attend(self, pyramid: Pyramid, positions: Tensor) -> Tensor:
        """Return the result of equation 1 before the output projection, (B, ΣHW, C)."""
        table, areas = pyramid.table(), pyramid.areas
        query, key = self.query_key(table + positions, areas).chunk(2, dim=-1)
        heads = [
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (query, key, self.value(table, areas))
        ]  # each (B, heads, ΣHW, C / heads)
        padding = padding_mask(pyramid)
        valid = None if padding is None else ~padding[:, None, None]  # (B, 1, 1, ΣHW)
        if self.kind == "multi":
            attended = self._attention(*heads, valid)
        else:
            masks = [None] * len(areas) if valid is None else valid.split(areas, dim=-1)
            levels = zip(*(part.split(areas, dim=2) for part in heads), masks, strict=True)
            attended = torch.cat([self._attention(*level) for level in levels], dim=2)
        return attended.transpose(1, 2).flatten(2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, valid, dropout)
