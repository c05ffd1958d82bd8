"""The decoder of Deformable DETR (section 4.2): queries look at each other and at a few points of
the pyramid around their reference points, from which they predict boxes; with its two variants,
boxes that are refined from layer to layer, and queries that are proposed by the pyramid."""

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import (
    MLP,
    Attention,
    ClassHead,
    DeformableAttention,
    FeedForward,
    apply_layer,
    check_heads,
    inverse_sigmoid,
)
from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY
from .deformable_queries import LearnedQueries
from .proposals import ProposedQueries

__all__ = ["DeformableDecoder", "move_references"]


def move_references(references: Tensor, deltas: Tensor) -> Tensor:
    """Boxes from references and what a box head says of them (appendices A.3 and A.4).

    Args:
        references: (..., 2) points x, y or (..., 4) boxes cx, cy, w, h, in [0, 1].
        deltas: (..., 4), added to the references before the sigmoid.

    Returns:
        (..., 4) cx, cy, w, h in [0, 1].
    """
    start = inverse_sigmoid(references)
    if references.shape[-1] == 2:
        start = F.pad(start, (0, 2))
    return (start + deltas).sigmoid()


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the pyramid, feed-forward network.

    Args:
        channels: C.
        num_levels: L.
        num_heads, num_points, ffn_dim, dropout: see `DeformableDecoder`.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        *,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(channels, num_heads, dropout)
        self.cross_attention = DeformableAttention(
            channels, num_heads, num_levels, num_points, dropout
        )
        self.ffn = FeedForward(channels, ffn_dim, dropout)
        for linear in (
            self.self_attention.attention.out_proj,
            self.ffn.linear1,
            self.ffn.linear2,
        ):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, content: Tensor, positions: Tensor, references: Tensor, pyramid: Pyramid
    ) -> Tensor:
        """(B, Q, C) content to content; arguments as in `Queries`."""
        content = self.self_attention(content, positions)
        return self.ffn(self.cross_attention(content, positions, references, pyramid))


@DECODER_REGISTRY.register()
class DeformableDecoder(nn.Module):
    """A stack of layers of deformable attention, each of which predicts and is supervised.

    Args:
        channels: C, of the queries and of the pyramid; even.
        num_levels: L.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        num_queries: Q.
        num_layers: layers in the stack.
        num_heads: heads of the self-attention and of the deformable attention.
        num_points: points that a head samples on each level.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: probability, after attention and both layers of the feed-forward networks.
        refine_boxes: each layer refines the boxes of the one before, which come without gradient,
            and has heads of its own; else all layers share reference points and heads.
        two_stage: queries are `ProposedQueries`, else `LearnedQueries`.
        checkpoint_layers: in training, keep only the inputs of each layer and compute it again in
            the backward pass.

    Raises:
        ValueError: an argument is out of its key's range, the heads do not divide the channels, or
            a two-stage decoder is to have one level or not to refine.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_levels: int,
        num_classes: int,
        *,
        class_head: str,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        refine_boxes: bool,
        two_stage: bool,
        checkpoint_layers: bool,
    ) -> None:
        super().__init__()
        options = {
            "num_heads": num_heads,
            "num_points": num_points,
            "ffn_dim": ffn_dim,
            "dropout": dropout,
        }
        check_arguments(
            "MODEL.DEFORMABLE_DECODER",
            num_queries=num_queries,
            num_layers=num_layers,
            refine_boxes=refine_boxes,
            two_stage=two_stage,
            **options,
        )
        check_heads("MODEL.DEFORMABLE_DECODER", num_heads, channels)
        if two_stage:
            _check_two_stage(num_levels, refine_boxes)
            self.queries = ProposedQueries(
                channels, num_classes, class_head=class_head, num_queries=num_queries
            )
        else:
            self.queries = LearnedQueries(channels, num_queries)
        self.refine_boxes = refine_boxes
        self.checkpoint_layers = checkpoint_layers
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(channels, num_levels, **options) for _ in range(num_layers)
        )
        heads = num_layers if refine_boxes else 1
        self.class_heads = nn.ModuleList(
            ClassHead(channels, num_classes, class_head) for _ in range(heads)
        )
        self.box_heads = nn.ModuleList(MLP(channels, 4, num_layers=3) for _ in range(heads))
        for box_head in self.box_heads:
            nn.init.zeros_(box_head.layers[-1].weight)
            nn.init.zeros_(box_head.layers[-1].bias)
        if not two_stage:  # from points, boxes start small
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, decoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.DEFORMABLE_DECODER
        return {
            "channels": detector.HIDDEN_DIM,
            "num_levels": len(detector.IN_FEATURES),
            "num_classes": detector.NUM_CLASSES,
            "class_head": detector.CLASS_HEAD,
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.DECODER,
            **{name.lower(): value for name, value in decoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """The proposals of a two-stage decoder, then one prediction per layer, the last final."""
        queries = self.queries(pyramid)
        content, references = queries.content, queries.references
        predictions = list(queries.proposals)
        recompute = self.checkpoint_layers and self.training
        for index, layer in enumerate(self.layers):
            inputs = (content, queries.positions, references, pyramid)
            content = apply_layer(layer, *inputs, recompute=recompute)
            heads = index if self.refine_boxes else 0
            logits = self.class_heads[heads](content).to(references.dtype)
            deltas = self.box_heads[heads](content).to(references.dtype)
            boxes = move_references(references, deltas)
            predictions.append(Prediction(logits, boxes))
            if self.refine_boxes:
                references = boxes.detach()
        return predictions


def _check_two_stage(num_levels: int, refine_boxes: bool) -> None:
    if not refine_boxes:
        raise ValueError(
            "MODEL.DEFORMABLE_DECODER.REFINE_BOXES is False; it must be True with TWO_STAGE, whose "
            "proposals are boxes to refine."
        )
    if num_levels < 2:
        raise ValueError(
            "MODEL.DEFORMABLE_DECODER.TWO_STAGE is True; it must be False with one level in "
            "MODEL.SET_DETECTOR.IN_FEATURES, as proposals differ in size by level."
        )
