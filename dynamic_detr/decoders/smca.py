"""Decoder of SMCA: the decoder of DETR with spatially modulated co-attention."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import nn

from ..config import check_arguments
from ..layers import MLP, ClassHead, apply_layer, check_levels, sine_positions
from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY
from .smca_layer import SMCADecoderLayer

__all__ = ["SMCADecoder"]


@DECODER_REGISTRY.register()
class SMCADecoder(nn.Module):
    """Stack of SMCA decoder layers with shared norm, class head and box head.

    The guides of the first layer predict the reference points, which all layers share. A reference
    point is also the initial centre of the predicted box (equation 12).

    Args:
        channels: C, divisible by 4.
        num_classes: K.
        num_levels: L.
        class_head: "focal" or "softmax", see `ClassHead`.
        num_queries: Q.
        num_layers: S.
        num_heads: heads of both attentions.
        ffn_dim: hidden units of the feed-forward networks.
        dropout: see `SMCADecoderLayer`.
        scales: see `SpatialPrior`.
        head_shared: True if all heads share one prior.
        scale_selection: True to attend to each level and sum the results with predicted weights,
            False for one softmax over the positions of all levels.
        beta: see `SpatialPrior`.
        checkpoint_layers: recompute each layer in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_levels: int,
        *,
        class_head: str,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        scales: str,
        head_shared: bool,
        scale_selection: bool,
        beta: float,
        checkpoint_layers: bool,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.SMCA_DECODER",
            num_queries=num_queries,
            num_layers=num_layers,
            scale_selection=scale_selection,
        )
        self.num_levels = num_levels
        self.checkpoint_layers = checkpoint_layers
        self.query_embed = nn.Embedding(num_queries, channels)
        self.reference_points = MLP(channels, 2, num_layers=3)
        self.layers = nn.ModuleList(
            SMCADecoderLayer(
                channels,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                selected_levels=num_levels if scale_selection else 1,
                scales=scales,
                head_shared=head_shared,
                beta=beta,
            )
            for _ in range(num_layers)
        )
        for part in (self.reference_points, self.layers):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in self.layers:
            layer.co_attention.prior.reset()
        self.norm = nn.LayerNorm(channels)
        self.class_logits = ClassHead(channels, num_classes, class_head)
        self.box_head = MLP(channels, 4, num_layers=3)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector, decoder = cfg.MODEL.SET_DETECTOR, cfg.MODEL.SMCA_DECODER
        return {
            "channels": detector.HIDDEN_DIM,
            "num_classes": detector.NUM_CLASSES,
            "num_levels": len(detector.IN_FEATURES),
            "class_head": detector.CLASS_HEAD,
            "checkpoint_layers": detector.ACTIVATION_CHECKPOINT.DECODER,
            **{name.lower(): value for name, value in decoder.items()},
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """Return one prediction per layer, the last one final.

        Raises:
            ValueError: the pyramid does not have `num_levels` levels.
        """
        check_levels(self, self.num_levels, pyramid)
        table = pyramid.table()
        pyramid_positions = sine_positions(pyramid, pyramid.channels, offset=1).to(table.dtype)
        positions = self.query_embed.weight.expand(len(table), -1, -1)
        queries = torch.zeros_like(positions)
        dtype = torch.promote_types(positions.dtype, torch.float32)
        guides = self.layers[0].guides(queries, positions)
        reference_logits = self.reference_points(guides).to(dtype)  # (B, Q, 2)
        references = reference_logits.sigmoid()  # equation 3
        recompute = self.checkpoint_layers and self.training
        outputs = []
        for layer in self.layers:
            inputs = (queries, positions, references, pyramid, pyramid_positions)
            queries = apply_layer(layer, *inputs, recompute=recompute)
            outputs.append(queries)
        outputs = self.norm(torch.stack(outputs))  # (S, B, Q, C)
        logits = self.class_logits(outputs).to(dtype)
        boxes = self.box_head(outputs).to(dtype)
        boxes = (boxes + F.pad(reference_logits, (0, 2))).sigmoid()  # equation 12
        return [Prediction(*stage) for stage in zip(logits, boxes, strict=True)]
