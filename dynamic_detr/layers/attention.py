"""Multi-head attention of a transformer layer, with its residual and norm after it."""

from torch import Tensor, nn

from ..structures import Pyramid

__all__ = ["Attention", "check_heads", "padding_mask"]


def check_heads(node: str, num_heads: int, channels: int) -> None:
    """Checks that the heads divide the channels.

    Args:
        node: of the key NUM_HEADS, for example "MODEL.TRANSFORMER_ENCODER".

    Raises:
        ValueError: they do not; the line names the keys.
    """
    if channels % num_heads:
        raise ValueError(
            f"{node}.NUM_HEADS is {num_heads}; it must divide MODEL.SET_DETECTOR.HIDDEN_DIM, which "
            f"is {channels}."
        )


def padding_mask(pyramid: Pyramid) -> Tensor | None:
    """The rows of the pyramid's table that belong to no image, which no query attends to.

    Returns:
        (B, ΣHW) bool, True for padding; None if there is provably none.
    """
    if all(pyramid.is_unpadded(level) for level in range(len(pyramid))):
        return None
    return ~pyramid.valid_table()


class Attention(nn.Module):
    """norm(x + dropout(attention(x + positions, keys, values))).

    Args:
        channels: C.
        num_heads: attention heads, a divisor of C; see `check_heads`.
        dropout: probability, of the attention weights and of what is added to x.
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
        """Self-attention, with positions added to queries and keys; or with keys and values of
        another table, cross-attention.

        Args:
            x: (B, N, C).
            positions: (B, N, C), added to x for the queries.
            keys: (B, M, C), with positions of their own already added.
            values: (B, M, C).
            padding: (B, M) bool, True for keys that are not attended to; None to attend to all.

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
