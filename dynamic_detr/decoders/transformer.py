"""DETR's decoder (End-to-End Object Detection with Transformers, section 3.2): learned queries look
at each other, and then at the whole image."""

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
    """Self-attention, cross-attention and a feed-forward network, each with its norm after it.

    Args:
        channels: C.
        num_heads: heads of both attentions.
        ffn_dim: hidden units of the feed-forward network.
        dropout: see `Attention` and `FeedForward`.
    """

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
        """One layer.

        Args:
            queries: (B, Q, C), the content.
            query_positions: (B, Q, C), added to queries and keys of the self-attention and to the
                queries of the cross-attention.
            keys: (B, ΣHW, C), what the encoder said, with positions added.
            values: (B, ΣHW, C), the same without.
            padding: (B, ΣHW) bool, True for rows that are not attended to.

        Returns:
            (B, Q, C).
        """
        queries = self.self_attention(queries, query_positions)
        queries = self.cross_attention(queries, query_positions, keys, values, padding)
        return self.ffn(queries)


@DECODER_REGISTRY.register()
class TransformerDecoder(nn.Module):
    """A stack of transformer layers. Every layer predicts, by one norm, class head and box head.

    The content of the queries starts at zero; what is learned is their position.

    Args:
        channels: C, of the queries and of the pyramid, divisible by 4.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        levels: indices of the levels of the pyramid that the queries look at; all if empty.
        num_queries: Q.
        num_layers: S.
        num_heads: heads of both attentions.
        ffn_dim: hidden units of the feed-forward network.
        dropout: probability.
        checkpoint_layers: in training, keep only the inputs of each layer and compute it again in
            the backward pass.

    Raises:
        ValueError: an argument is out of its key's range, or the heads do not divide the channels.
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
        names, wanted = list(detector.IN_FEATURES), decoder.pop("in_features")
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(
                f"MODEL.TRANSFORMER_DECODER.IN_FEATURES names {missing}; "
                f"MODEL.SET_DETECTOR.IN_FEATURES has {names}."
            )
        return {
            "channels": detector.HIDDEN_DIM,
            "num_classes": detector.NUM_CLASSES,
            "class_head": detector.CLASS_HEAD,
            "levels": [names.index(name) for name in wanted],
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.DECODER,
            **decoder,
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """One prediction per layer, the last one final."""
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
