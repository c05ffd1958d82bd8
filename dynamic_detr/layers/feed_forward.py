"""Feed-forward network with residual connection and layer norm (post-norm)."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """norm(x + dropout(linear(dropout(relu(linear(x)))))).

    Args:
        channels: C.
        ffn_dim: hidden units.
        dropout: probability, after both linear layers.
    """

    def __init__(self, channels: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        return self.norm(x + self.dropout(self.linear2(hidden)))
