"""Multi-scale deformable attention (Deformable DETR, equation 3) with residual and layer norm.

A query samples a few points of every level around its reference point.
"""

import math

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn
from ..structures import Pyramid
from .attention import padding_mask
from .checks import check_levels

__all__ = ["DeformableAttention"]


class DeformableAttention(nn.Module):
    """norm(x + dropout(attention(x + positions, references, pyramid))).

    Args:
        channels: C.
        num_heads: attention heads, a divisor of C; see `check_heads`.
        num_levels: L.
        num_points: P, sampled points per head and level.
        dropout: probability, for the output of the attention.
    """

    def __init__(
        self, channels: int, num_heads: int, num_levels: int, num_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.grid = (num_heads, num_levels, num_points)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, 2 * samples)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layers (appendix A.4).

        Each head samples in a direction of its own, point p at a distance of p cells, with equal
        weights for all queries.
        """
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        heads, levels, points = self.grid
        angle = torch.arange(heads, dtype=torch.float64) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction /= direction.abs().amax(dim=-1, keepdim=True)  # onto the sides of a square
        distance = torch.arange(1, points + 1, dtype=torch.float64)
        offsets = (direction[:, None, None] * distance[:, None]).expand(heads, levels, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, pyramid: Pyramid) -> Tensor:
        """Apply the attention.

        Args:
            x: (B, Q, C).
            positions: (B, Q, C), added to x for the queries.
            references: (B, Q, 2) points x, y or (B, Q, 4) boxes cx, cy, w, h, normalised by the
                unpadded image, float32 or wider. The unit of the sampling offsets is a cell of the
                level for points, and (w, h) / (2 P) for boxes.
            pyramid: pyramid of L levels; the padding is not read.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: the pyramid does not have `num_levels` levels.
        """
        heads, levels, points = self.grid
        check_levels(self, levels, pyramid)
        queries = x + positions
        offsets = self.sampling_offsets(queries).unflatten(-1, (heads, levels, points, 2))
        weights = self.attention_weights(queries).unflatten(-1, (heads, levels * points))
        attended = ms_deform_attn(
            self._values(pyramid),
            pyramid.shapes,
            self._sampling_locations(offsets, references, pyramid),
            weights.softmax(dim=-1).unflatten(-1, (levels, points)),
        )
        return self.norm(x + self.dropout(self.output_proj(attended)))

    def _values(self, pyramid: Pyramid) -> Tensor:
        """Return the projected values, (B, ΣHW, heads, C / heads), with zeros in the padding."""
        values, padding = self.value_proj(pyramid.table()), padding_mask(pyramid)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0)
        return values.unflatten(-1, (self.grid[0], -1))

    @staticmethod
    def _sampling_locations(offsets: Tensor, references: Tensor, pyramid: Pyramid) -> Tensor:
        """Return the sampling locations for `ms_deform_attn`, normalised by the padded sizes.

        Args:
            offsets: (B, Q, heads, L, P, 2), see `forward` for their unit.
            references: (B, Q, 2 or 4).
            pyramid: pyramid of L levels.

        Returns:
            (B, Q, heads, L, P, 2) x, y.
        """
        dtype = torch.promote_types(offsets.dtype, references.dtype)
        references = references.to(dtype)[:, :, None, None, None]  # (B, Q, 1, 1, 1, 2 or 4)
        if references.shape[-1] == 4:
            unit = references[..., 2:] * (0.5 / offsets.shape[4])
        else:
            sizes = [pyramid.sizes(level).flip(-1) for level in range(len(pyramid))]
            unit = torch.stack(sizes, dim=1).to(dtype).reciprocal()[:, None, None, :, None]
        # (references + offsets · unit) · ratios, multiplied out: offsets is the largest tensor
        ratios = pyramid.valid_ratios().to(dtype)[:, None, None, :, None]  # (B, 1, 1, L, 1, 2)
        return torch.addcmul(references[..., :2] * ratios, offsets.to(dtype), unit * ratios)
