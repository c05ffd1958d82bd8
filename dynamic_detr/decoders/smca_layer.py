"""Decoder layer of SMCA with spatially modulated co-attention (equations 5 to 9)."""

import torch
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import Attention, FeedForward, check_heads
from ..structures import Pyramid
from .spatial_prior import SpatialPrior

__all__ = ["SMCADecoderLayer", "SpatiallyModulatedCoAttention"]


class SpatiallyModulatedCoAttention(nn.Module):
    """norm(x + dropout(co-attention(x + positions, keys, values))), modulated by a spatial prior.

    The log-prior is added to the scaled dot products before the softmax. See `SMCADecoderLayer` for
    the arguments.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        dropout: float,
        *,
        selected_levels: int,
        scales: str,
        head_shared: bool,
        beta: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.prior = SpatialPrior(channels, 1 if head_shared else num_heads, scales, beta)
        self.level_logits = nn.Linear(channels, selected_levels) if selected_levels > 1 else None
        self.attention = nn.MultiheadAttention(
            channels, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        guides: Tensor,
        references: Tensor,
        pyramid: Pyramid,
        pyramid_positions: Tensor,
    ) -> Tensor:
        """Apply the attention to the content x of the queries, (B, Q, C).

        See `SMCADecoderLayer.forward` for the other arguments. The layers that predict the prior
        and the level weights read the guides (B, Q, C).
        """
        values = pyramid.table()
        keys = values + pyramid_positions
        log_priors, largest = zip(*self.prior(guides, references, pyramid), strict=True)
        if self.level_logits is None:
            largest_of_all = torch.stack(largest).amax(dim=0)
            shifts = (level - largest_of_all for level in largest)
            log_prior = torch.cat([p + s for p, s in zip(log_priors, shifts, strict=True)], dim=-1)
            attended = self._attend(x + positions, keys, values, log_prior)
        else:
            areas = pyramid.areas
            levels = zip(keys.split(areas, 1), values.split(areas, 1), log_priors, strict=True)
            weights = self.level_logits(guides).softmax(dim=-1).unbind(dim=-1)  # equation 7
            # equations 8 and 9; the weights sum to 1, so the output projection commutes
            attended = sum(
                weight[..., None] * self._attend(x + positions, *level)
                for weight, level in zip(weights, levels, strict=True)
            )
        return self.norm(x + self.dropout(attended))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, log_prior: Tensor) -> Tensor:
        """Return the result of equations 5 and 6, (B, Q, C)."""
        log_prior = log_prior.to(queries.dtype).expand(-1, self.num_heads, -1, -1)
        return self.attention(
            queries, keys, values, attn_mask=log_prior.flatten(0, 1), need_weights=False
        )[0]


class SMCADecoderLayer(nn.Module):
    """Self-attention, spatially modulated co-attention and a feed-forward network.

    Args:
        channels: C.
        num_heads: heads of both attentions.
        ffn_dim: hidden units of the feed-forward network.
        dropout: probability, for the attention weights, after both attentions and after both layers
            of the feed-forward network.
        selected_levels: L to attend to each level and sum the results with predicted weights, 1 for
            one softmax over the positions of all levels.
        scales: see `SpatialPrior`.
        head_shared: True if all heads share one prior.
        beta: see `SpatialPrior`.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        selected_levels: int,
        scales: str,
        head_shared: bool,
        beta: float,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.SMCA_DECODER",
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            dropout=dropout,
            scales=scales,
            head_shared=head_shared,
            beta=beta,
        )
        check_heads("MODEL.SMCA_DECODER", num_heads, channels)
        self.guide_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads, dropout)
        self.co_attention = SpatiallyModulatedCoAttention(
            channels,
            num_heads,
            dropout,
            selected_levels=selected_levels,
            scales=scales,
            head_shared=head_shared,
            beta=beta,
        )
        self.ffn = FeedForward(channels, ffn_dim, dropout)

    def guides(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Return the input of the layers that predict the spatial prior, (B, Q, C)."""
        return self.guide_norm(queries + positions)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        references: Tensor,
        pyramid: Pyramid,
        pyramid_positions: Tensor,
    ) -> Tensor:
        """Apply the layer.

        Args:
            queries: (B, Q, C) content of the queries.
            positions: (B, Q, C), added to the content for attention.
            references: (B, Q, 2) x, y, normalised by the image, float32 or wider.
            pyramid: pyramid of L levels.
            pyramid_positions: (B, ΣHW, C), added to the features of the pyramid for the keys.

        Returns:
            (B, Q, C).
        """
        guides = self.guides(queries, positions)
        queries = self.self_attention(queries, positions)
        queries = self.co_attention(
            queries, positions, guides, references, pyramid, pyramid_positions
        )
        return self.ffn(queries)
