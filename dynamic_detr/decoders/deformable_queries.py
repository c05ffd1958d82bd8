"""Initial queries and reference points of the decoder of Deformable DETR."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..structures import Prediction, Pyramid

__all__ = ["LearnedQueries", "Queries"]


@dataclass(frozen=True)
class Queries:
    """Input of the first decoder layer.

    Args:
        content: (B, Q, C).
        positions: (B, Q, C), added to the content for attention.
        references: (B, Q, 2) points x, y or (B, Q, 4) boxes cx, cy, w, h, normalised by the
            unpadded image, float32 or wider.
        proposals: predictions of the first stage of a two-stage decoder.
    """

    content: Tensor
    positions: Tensor
    references: Tensor
    proposals: list[Prediction] = field(default_factory=list)


class LearnedQueries(nn.Module):
    """Learned queries, the same for all images; their positions predict the reference points.

    Args:
        channels: C.
        num_queries: Q.
    """

    def __init__(self, channels: int, num_queries: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_queries, 2 * channels)
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, pyramid: Pyramid) -> Queries:
        """Return the queries of a batch, with points as references."""
        positions, content = self.embed.weight.chunk(2, dim=-1)
        with torch.autocast(positions.device.type, enabled=False):  # bfloat16 is too coarse
            points = self.reference_points(positions)
        points = points.to(torch.promote_types(points.dtype, torch.float32)).sigmoid()
        batch = pyramid.image_sizes.shape[0]
        return Queries(*(part.expand(batch, -1, -1) for part in (content, positions, points)))
