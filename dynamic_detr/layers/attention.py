"""Multi-head attention with residual connection and layer norm (post-norm)."""

from torch import Tensor, nn

from ..structures import Pyramid

__all__ = ["Attention", "padding_mask"]


def padding_mask(pyramid: Pyramid) -> Tensor | None:
    """Return the padding mask of the pyramid's table.

    Returns:
        (B, ΣHW) bool, True for padding; None if there is provably no padding.
    """
    if all(pyramid.is_unpadded(level) for level in range(len(pyramid))):
        return None
    return ~pyramid.valid_table()


class Attention(nn.Module):
    """norm(x + dropout(attention(x + positions, keys, values))).

    Args:
        channels: C.
        num_heads: attention heads, a divisor of C.
        dropout: probability, for the attention weights and the output.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            channels, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Apply self-attention, or cross-attention if keys and values are given.

        Args:
            x: (B, N, C).
            positions: (B, N, C), added to x for the queries; in self-attention also for the keys.
            keys: (B, M, C), with position embeddings already added.
            values: (B, M, C).
            padding: (B, M) bool, True for keys to ignore; None if there are none.

        Returns:
            (B, N, C).
        """
        queries = x + positions
        if keys is None:
            keys, values = queries, x
        attended = self.attention(
            queries, keys, values, key_padding_mask=padding, need_weights=False
        )[0]
        return self.norm(x + self.dropout(attended))
