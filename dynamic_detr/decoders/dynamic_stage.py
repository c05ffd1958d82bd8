"""One stage of the dynamic decoder.

RoIAlign pools the region of each query's box (equation 8). After self-attention over the queries
(equation 9), each query generates a filter that is applied to its region (equations 10 and 11).
The result predicts classes and moves the box (equations 12 to 14).
"""

import math

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..config import check_arguments
from ..layers import ClassHead, check_heads
from ..ops import pyramid_roi_align
from ..structures import Pyramid
from .dynamic_interaction import DYNAMIC_FILTERS

__all__ = ["DynamicDecoderStage", "apply_box_deltas"]

CENTER_WEIGHT = 2.0  # dx and dy are divided by it
MAX_LOG_SCALE = math.log(1e5 / 16)  # upper bound of dw and dh


def apply_box_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move and scale boxes relative to their size, without clipping them to the image.

    Detectron2's `Box2BoxTransform` takes corners and computes in float32 only.

    Args:
        boxes: (..., 4) cx, cy, w, h in any unit.
        deltas: (..., 4) dx, dy, dw, dh.

    Returns:
        (..., 4) cx, cy, w, h in the unit of the boxes.
    """
    center = boxes[..., :2] + deltas[..., :2] / CENTER_WEIGHT * boxes[..., 2:]
    size = boxes[..., 2:] * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([center, size], dim=-1)


class DynamicDecoderStage(nn.Module):
    """Refinement of queries and boxes, with predicted classes.

    Args:
        channels: C.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        num_heads: heads of the self-attention.
        ffn_dim: hidden units of the feed-forward network.
        dropout: probability, after attention, dynamic filters and both layers of the feed-forward
            network.
        pooling_size: R, bins on each side of a pooled region.
        sampling_ratio: bilinear samples on each side of a bin.
        canonical_size: square root of the area, in pixels, of the boxes pooled from stride 16.
        dynamic_dim: hidden channels of the pair of filters.
        dynamic_filter: "bottleneck" for two dynamic 1×1 convolutions C → dynamic_dim → C, or
            "residual" for the same pair, added to the region, or "single" for one C → C, as in
            equation 11.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        class_head: str,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        pooling_size: int,
        sampling_ratio: int,
        canonical_size: float,
        dynamic_dim: int,
        dynamic_filter: str,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.DYNAMIC_DECODER",
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            dropout=dropout,
            pooling_size=pooling_size,
            sampling_ratio=sampling_ratio,
            canonical_size=canonical_size,
            dynamic_dim=dynamic_dim,
            dynamic_filter=dynamic_filter,
        )
        check_heads("MODEL.DYNAMIC_DECODER", num_heads, channels)
        self.pooling_size = pooling_size
        self.sampling_ratio = sampling_ratio
        self.canonical_size = canonical_size

        self.self_attention = nn.MultiheadAttention(
            channels, num_heads, dropout=dropout, batch_first=True
        )
        self.norm_attention = nn.LayerNorm(channels)
        self.interaction = DYNAMIC_FILTERS[dynamic_filter](channels, pooling_size**2, dynamic_dim)
        self.norm_interaction = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, ffn_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(ffn_dim, channels),
        )
        self.norm_ffn = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.class_branch = branch(channels, 1)
        self.class_logits = ClassHead(channels, num_classes, class_head)
        self.box_branch = branch(channels, 3)
        self.box_deltas = nn.Linear(channels, 4)

        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # at first, stages hardly move the boxes: large moves would multiply over the stages
        nn.init.normal_(self.box_deltas.weight, std=0.01)
        nn.init.zeros_(self.box_deltas.bias)

    def forward(
        self, pyramid: Pyramid, queries: Tensor, boxes: Tensor, apart: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the stage.

        Args:
            pyramid: output of the encoder.
            queries: (B, Q, C).
            boxes: (B, Q, 4) cx, cy, w, h, normalised by the unpadded image, float32 or wider.
            apart: number of queries, the last ones, that attend to themselves alone.

        Returns:
            Refined queries (B, Q, C); logits (B, Q, K), or (B, Q, K + 1) with a softmax head, and
            refined boxes (B, Q, 4), both in the dtype of the boxes.
        """
        height, width = pyramid.image_sizes.to(boxes.dtype).unbind(dim=1)
        scale = torch.stack([width, height, width, height], dim=1)[:, None]
        regions = pyramid_roi_align(
            pyramid.table(),
            pyramid.shapes,
            pyramid.strides,
            pyramid.image_sizes,
            box_convert(boxes, "cxcywh", "xyxy") * scale,
            self.pooling_size,
            self.sampling_ratio,
            self.canonical_size,
        )
        queries = self.norm_attention(queries + self.dropout(self._attend(queries, apart)))
        seen = self.interaction(queries, regions)
        queries = self.norm_interaction(queries + self.dropout(seen))
        queries = self.norm_ffn(queries + self.dropout(self.ffn(queries)))
        logits = self.class_logits(self.class_branch(queries)).to(boxes.dtype)
        deltas = self.box_deltas(self.box_branch(queries)).to(boxes.dtype)
        return queries, logits, apply_box_deltas(boxes, deltas)

    def _attend(self, queries: Tensor, apart: int) -> Tensor:
        """Return the self-attention of queries (B, Q, C), the last `apart` each for itself."""
        among, alone = queries.split([queries.shape[1] - apart, apart], dim=1)
        attended = self.self_attention(among, among, among, need_weights=False)[0]
        if apart == 0:
            return attended
        one = alone.flatten(0, 1)[:, None]
        own = self.self_attention(one, one, one, need_weights=False)[0]
        return torch.cat([attended, own.view_as(alone)], dim=1)


def branch(channels: int, layers: int) -> nn.Sequential:
    """Return linear layers without bias, each with LayerNorm and ReLU: (..., C) to (..., C).

    torchvision's `MLP` has no norm and activation after its last layer.
    """
    return nn.Sequential(
        *(
            module
            for _ in range(layers)
            for module in (
                nn.Linear(channels, channels, bias=False),
                nn.LayerNorm(channels),
                nn.ReLU(inplace=True),
            )
        )
    )
