"""Decoder of DETR (section 3.2): self-attention of queries and cross-attention to a pyramid."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import (
    MLP,
    Attention,
    ClassHead,
    FeedForward,
    apply_layer,
    check_heads,
    padding_mask,
    sine_positions,
)
from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]


class TransformerDecoderLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward network; see `TransformerDecoder`."""

    def __init__(self, channels: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(channels, num_heads, dropout)
        self.cross_attention = Attention(channels, num_heads, dropout)
        self.ffn = FeedForward(channels, ffn_dim, dropout)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        keys: Tensor,
        values: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            queries: (B, Q, C) content of the queries.
            query_positions: (B, Q, C), added to the content for attention.
            keys: (B, ΣHW, C), features of the pyramid plus position embeddings.
            values: (B, ΣHW, C), features of the pyramid.
            padding: (B, ΣHW) bool, True for positions to ignore; None if there are none.

        Returns:
            (B, Q, C).
        """
        queries = self.self_attention(queries, query_positions)
        queries = self.cross_attention(queries, query_positions, keys, values, padding)
        return self.ffn(queries)


@DECODER_REGISTRY.register()
class TransformerDecoder(nn.Module):
    """Stack of transformer layers with shared norm, class head and box head.

    The initial content of the queries is zero; their positions are learned.

    Args:
        channels: C, divisible by 4.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        levels: indices of the levels that the queries attend to; all if empty.
        num_queries: Q.
        num_layers: S.
        num_heads: heads of both attentions.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: probability, see `Attention` and `FeedForward`.
        checkpoint_layers: recompute each layer in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        class_head: str,
        levels: Sequence[int],
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        checkpoint_layers: bool,
    ) -> None:
        super().__init__()
        node = "MODEL.TRANSFORMER_DECODER"
        options = {"num_heads": num_heads, "ffn_dim": ffn_dim, "dropout": dropout}
        check_arguments(node, num_queries=num_queries, num_layers=num_layers, **options)
        check_heads(node, num_heads, channels)
        self.levels = tuple(levels)
        self.checkpoint_layers = checkpoint_layers
        self.query_embed = nn.Embedding(num_queries, channels)
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(channels, **options) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.class_logits = ClassHead(channels, num_classes, class_head)
        self.box_head = MLP(channels, 4, num_layers=3)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector = cfg.MODEL.SET_DETECTOR
        decoder = {name.lower(): v for name, v in cfg.MODEL.TRANSFORMER_DECODER.items()}
        names, selected = list(detector.IN_FEATURES), decoder.pop("in_features")
        missing = [name for name in selected if name not in names]
        if missing:
            raise ValueError(
                f"MODEL.TRANSFORMER_DECODER.IN_FEATURES names {missing}; "
                f"MODEL.SET_DETECTOR.IN_FEATURES has {names}."
            )
        return {
            "channels": detector.HIDDEN_DIM,
            "num_classes": detector.NUM_CLASSES,
            "class_head": detector.CLASS_HEAD,
            "levels": [names.index(name) for name in selected],
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.DECODER,
            **decoder,
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """Return one prediction per layer, the last one final."""
        if self.levels:
            pyramid = pyramid.select(self.levels)
        values, padding = pyramid.table(), padding_mask(pyramid)
        keys = values + sine_positions(pyramid, pyramid.channels, offset=1).to(values.dtype)
        query_positions = self.query_embed.weight.expand(len(values), -1, -1)
        queries = torch.zeros_like(query_positions)
        recompute = self.checkpoint_layers and self.training
        states = []
        for layer in self.layers:
            inputs = queries, query_positions, keys, values, padding
            queries = apply_layer(layer, *inputs, recompute=recompute)
            states.append(queries)
        states = self.norm(torch.stack(states))  # (S, B, Q, C)
        dtype = torch.promote_types(self.query_embed.weight.dtype, torch.float32)
        logits = self.class_logits(states).to(dtype)
        boxes = self.box_head(states).to(dtype).sigmoid()
        return [Prediction(*stage) for stage in zip(logits, boxes, strict=True)]
