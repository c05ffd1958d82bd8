"""Dense distinct queries (DDQ, arXiv 2303.12776).

Every position of the pyramid predicts classes and a box. Non-maximum suppression selects distinct
predictions with the best scores as the initial queries and boxes of the decoder.
"""

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

NO_BOX = 0.5  # cx, cy, w and h of a query without position
NEVER = -1e4  # logit of the padding, without loss and gradient


@dataclass(frozen=True)
class DistinctQueries:
    """Input of the first decoder stage.

    Args:
        content: (B, Q, C).
        logits: (B, Q, K) sigmoid logits, detached, float32 or wider.
        boxes: (B, Q, 4) cx, cy, w, h, normalised by the unpadded image, detached, float32 or wider.
        dense: prediction of all positions, from which the queries are selected.
    """

    content: Tensor
    logits: Tensor
    boxes: Tensor
    dense: Prediction


class DenseQueries(nn.Module):
    """Queries and boxes from a dense head.

    The head has one hidden layer and two output layers, for classes and boxes. It is applied to
    each position separately, because the encoder has already mixed neighbouring positions. Boxes
    are predicted relative to square anchors centred at the positions. Training assigns several
    positions to each object, so many of the best predictions are duplicates; class-agnostic
    non-maximum suppression (NMS) removes them.

    Args:
        channels: C.
        num_classes: K. The head has sigmoid logits for any class head of the stages.
        num_queries: Q.
        anchor_scale: side of an anchor in strides of its level.
        candidates: number of positions with the best scores before NMS; raised to Q if smaller.
        nms_threshold: IoU above which a better candidate suppresses another. If fewer than Q
            candidates are kept, the best suppressed ones follow them.

    Raises:
        ValueError: an argument is out of range.
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
        """Return the queries of a batch.

        If an image has fewer than Q positions, the content of its last queries does not depend on
        the image, their boxes are (0.5, 0.5, 0.5, 0.5) and their logits 0.
        """
        prediction = self._predict(pyramid)
        index, chosen = self._choose(prediction, pyramid.valid_table())
        rows = index[..., None]
        boxes = prediction.pred_boxes.detach().take_along_dim(rows, dim=1)
        boxes = torch.where(chosen, boxes, NO_BOX)
        logits = prediction.pred_logits.detach().take_along_dim(rows, dim=1)
        logits = torch.where(chosen, logits, 0)
        content = torch.where(chosen, pyramid.table().take_along_dim(rows, dim=1), 0)
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
        """Select the queries.

        Args:
            prediction: prediction of all positions.
            valid: (B, ΣHW) bool, False in the padding.

        Returns:
            Rows of the table, (B, Q) int64, and whether the image has such a row, (B, Q, 1) bool.
        """
        scores = prediction.pred_logits.amax(dim=-1).masked_fill(~valid, -float("inf"))
        scores = F.pad(scores, (0, max(0, self.num_queries - scores.shape[1])), value=-float("inf"))
        scores, index = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
        index = index.clamp(max=valid.shape[1] - 1)
        boxes = box_cxcywh_to_xyxy(prediction.pred_boxes.take_along_dim(index[..., None], dim=1))
        present = scores > -float("inf")
        # first the kept candidates, then the suppressed ones, then the padding; each by score
        order = torch.arange(scores.shape[1], device=scores.device)
        order = order + scores.shape[1] * (~nms_mask(boxes, self.nms_threshold) + 2 * ~present)
        first = order.topk(self.num_queries, dim=1, largest=False).indices
        return index.gather(1, first), present.gather(1, first)[..., None]


def _cells(pyramid: Pyramid) -> Tensor:
    """Return the cell of each position, (B, ΣHW, 4) cx, cy, w, h, normalised by the image."""
    sizes = pyramid.image_sizes.flip(-1)[:, None]  # (B, 1, 2) width, height
    levels = []
    for level, centers in enumerate(pyramid.level_centers()):
        side = pyramid.strides[level] / sizes
        center = centers * pyramid.sizes(level).flip(-1)[:, None] * side
        levels.append(torch.cat([center, side.expand_as(center)], dim=-1))
    return torch.cat(levels, dim=1)
