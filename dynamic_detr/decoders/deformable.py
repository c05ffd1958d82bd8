"""Decoder of Deformable DETR (section 4.2), with iterative box refinement and two-stage queries."""

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
    """Return references moved by the output of a box head (appendices A.3 and A.4).

    Args:
        references: (..., 2) points x, y or (..., 4) boxes cx, cy, w, h, in [0, 1].
        deltas: (..., 4), added to the inverse sigmoid of the references.

    Returns:
        (..., 4) cx, cy, w, h in [0, 1].
    """
    start = inverse_sigmoid(references)
    if references.shape[-1] == 2:
        start = F.pad(start, (0, 2))
    return (start + deltas).sigmoid()


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network.

    See `DeformableDecoder` for the arguments.
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
        """Return the content (B, Q, C) of the next layer; see `Queries` for the arguments."""
        content = self.self_attention(content, positions)
        return self.ffn(self.cross_attention(content, positions, references, pyramid))


@DECODER_REGISTRY.register()
class DeformableDecoder(nn.Module):
    """Stack of deformable attention layers with one prediction per layer.

    Args:
        channels: C, even.
        num_levels: L.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        num_queries: Q.
        num_layers: number of layers.
        num_heads: heads of both attentions.
        num_points: sampled points per head and level.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: probability, after attention and both layers of the feed-forward networks.
        refine_boxes: True if each layer has its own heads and refines the detached boxes of the
            previous layer; False if all layers share the reference points and the heads.
        two_stage: True for `ProposedQueries`, False for `LearnedQueries`.
        checkpoint_layers: recompute each layer in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, the heads do not divide the channels, or
            `two_stage` is True with one level, with "softmax" or without `refine_boxes`.
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
            _check_two_stage(num_levels, class_head, refine_boxes)
            self.queries = ProposedQueries(channels, num_classes, num_queries=num_queries)
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
        if not two_stage:  # boxes are small at first; a reference point has no size
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
        """Return the proposals, if two-stage, and one prediction per layer, the last one final."""
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


def _check_two_stage(num_levels: int, class_head: str, refine_boxes: bool) -> None:
    if not refine_boxes:
        raise ValueError(
            "MODEL.DEFORMABLE_DECODER.REFINE_BOXES is False; it must be True with TWO_STAGE, whose "
            "proposals are boxes to refine."
        )
    if class_head != "focal":
        raise ValueError(
            f"MODEL.SET_DETECTOR.CLASS_HEAD is {class_head!r}; it must be 'focal' with "
            "MODEL.DEFORMABLE_DECODER.TWO_STAGE."
        )
    if num_levels < 2:
        raise ValueError(
            "MODEL.DEFORMABLE_DECODER.TWO_STAGE is True; it must be False with one level in "
            "MODEL.SET_DETECTOR.IN_FEATURES, as proposals differ in size by level."
        )
