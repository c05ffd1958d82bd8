"""First stage of two-stage Deformable DETR (section 4.2, appendix A.4).

Every position of the pyramid proposes a box. The proposals with the best scores become the queries
and reference boxes of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MLP, ClassHead, inverse_sigmoid, sine_embedding
from ..structures import Prediction, Pyramid
from .deformable_queries import Queries

__all__ = ["ProposedQueries"]

BASE_SIZE = 0.05  # side of an anchor of the finest level, normalised by the image
LEAST, MOST = 0.01, 0.99  # range of cx, cy, w and h of an anchor in use
NEVER = -1e4  # logit of the padding, without loss and gradient, which is matched last


class ProposedQueries(nn.Module):
    """Queries from the proposals with the best scores.

    Each position refines an anchor, a square at its centre whose side doubles from level to level.
    The score of a proposal is the logit of class 0, which the criterion trains with class 0 for all
    objects. If a coordinate of an anchor is outside (0.01, 0.99), the features of the position are
    set to zero and the proposed box is (1, 1, 1, 1); it can still be selected, as in the published
    code. The padding proposes the same box and is selected only if the image has fewer than Q
    positions.

    Args:
        channels: C, even.
        num_classes: K.
        num_queries: Q.
    """

    def __init__(self, channels: int, num_classes: int, *, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.memory = nn.Linear(channels, channels)
        self.memory_norm = nn.LayerNorm(channels)
        self.class_head = ClassHead(channels, num_classes, "focal")
        self.box_head = MLP(channels, 4, num_layers=3)
        self.box_embed = nn.Linear(2 * channels, 2 * channels)
        self.box_embed_norm = nn.LayerNorm(2 * channels)
        for matrix in (self.memory.weight, self.box_embed.weight):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)

    def forward(self, pyramid: Pyramid) -> Queries:
        """Return the queries of a batch, with detached boxes as references."""
        table, valid = pyramid.table(), pyramid.valid_table()
        anchors = self._anchors(pyramid).to(torch.promote_types(table.dtype, torch.float32))
        inside = valid & ((anchors > LEAST) & (anchors < MOST)).all(dim=-1)  # (B, ΣHW)
        memory = torch.where(inside[..., None], table, 0)
        memory = self.memory_norm(self.memory(memory))
        with torch.autocast(table.device.type, enabled=False):  # scores would tie in half precision
            logits = self.class_head(memory.to(self.class_head.weight.dtype)).to(anchors.dtype)
        starts = inverse_sigmoid(anchors).masked_fill(~inside[..., None], float("inf"))
        box_logits = self.box_head(memory).to(anchors.dtype) + starts
        boxes = self._best(box_logits, logits, valid).sigmoid().detach()
        embedded = sine_embedding(boxes, pyramid.channels // 2).to(table.dtype)  # (B, Q, 2C)
        positions, content = self.box_embed_norm(self.box_embed(embedded)).chunk(2, dim=-1)
        logits = torch.where(valid[..., None], logits, NEVER)
        proposals = Prediction(logits, box_logits.sigmoid(), is_proposal=True)
        return Queries(content, positions, boxes, [proposals])

    def _best(self, box_logits: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        """Return the box logits of the best proposals, (B, Q, 4), by score; the padding is last."""
        scores = logits[..., 0].detach().masked_fill(~valid, -float("inf"))
        lacking = max(0, self.num_queries - scores.shape[1])
        if lacking:
            scores = F.pad(scores, (0, lacking), value=-float("inf"))
            box_logits = F.pad(box_logits, (0, 0, 0, lacking), value=float("inf"))
        best = scores.topk(self.num_queries, dim=1).indices
        return box_logits.take_along_dim(best[..., None], dim=1)

    @staticmethod
    def _anchors(pyramid: Pyramid) -> Tensor:
        """Return the anchors, (B, ΣHW, 4) float32 cx, cy, w, h, normalised by the image."""
        levels = [
            F.pad(centers, (0, 2), value=BASE_SIZE * 2**level)
            for level, centers in enumerate(pyramid.level_centers())
        ]
        return torch.cat(levels, dim=1)
