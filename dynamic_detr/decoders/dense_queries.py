"""Dense distinct queries (arXiv 2303.12776): every position of the pyramid predicts classes and a
box, and the best of those that differ become the first boxes and queries of the decoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import ClassHead
from ..ops import nms_mask
from ..structures import Prediction, Pyramid, box_cxcywh_to_xyxy
from .dynamic_stage import apply_box_deltas, branch

__all__ = ["DenseQueries", "DistinctQueries"]

NO_BOX = 0.5  # all four numbers of a box for which there is no position
NEVER = -1e4  # a logit without loss or gradient


@dataclass(frozen=True)
class DistinctQueries:
    """The input of the first decoder stage.

    Args:
        content: (B, Q, C).
        logits: (B, Q, K) of a sigmoid each, without gradient.
        boxes: (B, Q, 4) cx, cy, w, h, normalised by the unpadded image, without gradient, float32
            or wider; as the logits.
        dense: the prediction that they were chosen from, of every position.
    """

    content: Tensor
    logits: Tensor
    boxes: Tensor
    dense: Prediction


class DenseQueries(nn.Module):
    """Queries and boxes from a dense head.

    The head is one hidden layer, and output layers for classes and boxes, at every position by
    itself: the encoder has mixed each position with its neighbours. A box is predicted
    relative to a square anchor around its position. The head is trained with several positions for
    each object, so that many of the best say the same; class-agnostic non-maximum suppression
    leaves one of them.

    Args:
        channels: C.
        num_classes: K. The dense head has sigmoid logits whatever those of the stages are.
        num_queries: Q.
        anchor_scale: side of an anchor, in strides of its level.
        candidates: positions with the best scores that suppression chooses from; at least Q are
            taken.
        nms_threshold: IoU above which a candidate is suppressed by a better one. Suppressed
            candidates come last, and only where fewer than Q are left.

    Raises:
        ValueError: an argument is out of its key's range.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_queries: int,
        anchor_scale: float,
        candidates: int,
        nms_threshold: float,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.DENSE_QUERIES",
            anchor_scale=anchor_scale,
            candidates=candidates,
            nms_threshold=nms_threshold,
        )
        self.num_queries = num_queries
        self.anchor_scale = anchor_scale
        self.candidates = max(candidates, num_queries)
        self.nms_threshold = nms_threshold
        self.hidden = branch(channels, 1)
        self.class_logits = ClassHead(channels, num_classes, "focal")
        self.box_deltas = nn.Linear(channels, 4)
        self.content = nn.Linear(channels, channels)
        self.content_norm = nn.LayerNorm(channels)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.01)
        nn.init.zeros_(self.box_deltas.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "channels": cfg.MODEL.SET_DETECTOR.HIDDEN_DIM,
            "num_classes": cfg.MODEL.SET_DETECTOR.NUM_CLASSES,
            "num_queries": cfg.MODEL.DYNAMIC_DECODER.NUM_QUERIES,
            **{name.lower(): value for name, value in cfg.MODEL.DENSE_QUERIES.items()},
        }

    def forward(self, pyramid: Pyramid) -> DistinctQueries:
        """Where an image has fewer than Q positions, the last queries carry nothing of it."""
        prediction = self._predict(pyramid)
        index, chosen = self._choose(prediction, pyramid.valid_table())
        boxes = _gather(prediction.pred_boxes.detach(), index)
        boxes = torch.where(chosen, boxes, NO_BOX)
        logits = torch.where(chosen, _gather(prediction.pred_logits.detach(), index), 0)
        content = torch.where(chosen, _gather(pyramid.table(), index), 0)
        content = self.content_norm(self.content(content))
        return DistinctQueries(content, logits, boxes, prediction)

    def _predict(self, pyramid: Pyramid) -> Prediction:
        table, valid = pyramid.table(), pyramid.valid_table()[..., None]
        cells = _cells(pyramid).to(torch.promote_types(table.dtype, torch.float32))
        hidden = self.hidden(table)
        with torch.autocast(table.device.type, enabled=False):  # scores would tie in half precision
            logits = self.class_logits(hidden.to(self.class_logits.weight.dtype)).to(cells.dtype)
        deltas = self.box_deltas(hidden).to(cells.dtype)
        anchors = torch.cat([cells[..., :2], self.anchor_scale * cells[..., 2:]], dim=-1)
        boxes = torch.where(valid, apply_box_deltas(anchors, deltas), anchors)
        logits = torch.where(valid, logits, NEVER)
        return Prediction(logits, boxes, is_proposal=True, cells=cells)

    @torch.no_grad()
    def _choose(self, prediction: Prediction, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, Q) of the table; and whether there was a position to choose: (B, Q, 1) bool."""
        scores = prediction.pred_logits.amax(dim=-1).masked_fill(~valid, -float("inf"))
        scores = F.pad(scores, (0, max(0, self.num_queries - scores.shape[1])), value=-float("inf"))
        scores, index = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
        index = index.clamp(max=valid.shape[1] - 1)
        boxes = box_cxcywh_to_xyxy(_gather(prediction.pred_boxes, index))
        present = scores > -float("inf")
        # kept ones first, then suppressed ones, then those that are none; the best first in each
        order = torch.arange(scores.shape[1], device=scores.device)
        order = order + scores.shape[1] * (~nms_mask(boxes, self.nms_threshold) + 2 * ~present)
        first = order.topk(self.num_queries, dim=1, largest=False).indices
        return index.gather(1, first), present.gather(1, first)[..., None]


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows (B, Q, ...) of a table (B, N, ...)."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def _cells(pyramid: Pyramid) -> Tensor:
    """The cell of each position as a box, cx, cy, w, h, normalised by the image: (B, ΣHW, 4)."""
    sizes = pyramid.image_sizes.flip(-1)[:, None]  # (B, 1, 2) width, height
    levels = []
    for level, centers in enumerate(pyramid.level_centers()):
        side = pyramid.strides[level] / sizes
        center = centers * pyramid.sizes(level).flip(-1)[:, None] * side
        levels.append(torch.cat([center, side.expand_as(center)], dim=-1))
    return torch.cat(levels, dim=1)
