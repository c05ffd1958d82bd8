"""The dynamic decoder (equations 8 to 14): learned queries and boxes, refined stage by stage
from the whole image down to the object."""

import math

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY
from .dynamic_stage import DynamicDecoderStage

__all__ = ["DynamicDecoder"]


def image_boxes(count: int) -> Tensor:
    """The whole image, again and again: (count, 4) cx, cy, w, h, normalised."""
    return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)


def grid_boxes(count: int) -> Tensor:
    """Squares spread evenly over the image, twice as wide as their distance.

    They lie on the smallest square grid with enough places; where it has more than enough, places
    are left out evenly.

    Returns:
        (count, 4) cx, cy, w, h, normalised.
    """
    side = math.ceil(math.sqrt(count))
    place = torch.linspace(0, side**2 - 1, count).round()
    row, column = place.div(side, rounding_mode="floor"), place % side
    centers = torch.stack([column + 0.5, row + 0.5], dim=1) / side
    return torch.cat([centers, torch.full((count, 2), min(2 / side, 1.0))], dim=1)


INITIAL_BOXES = {"image": image_boxes, "grid": grid_boxes}


@DECODER_REGISTRY.register()
class DynamicDecoder(nn.Module):
    """A stack of decoder stages with weights of their own.

    Every stage predicts and is supervised; its boxes go to the next stage without gradient.

    Args:
        channels: C, of the queries and of the pyramid.
        num_classes: K.
        num_queries: Q.
        num_stages: S.
        class_head: "focal" for K independent sigmoid logits, "softmax" for K + 1 with "no object".
        initial_boxes: where the first boxes start; "image": the whole image each, as the paper;
            "grid": see `grid_boxes`.
        learn_initial_boxes: whether the first boxes are parameters, or stay where they start.
        checkpoint_stages: in training, keep only the inputs of each stage and compute it again in
            the backward pass.
        num_heads, ffn_dim, dropout, pooling_size, sampling_ratio, canonical_size, dynamic_dim,
            dynamic_filter: see `DynamicDecoderStage`.

    Raises:
        ValueError: initial_boxes is neither.
    """

    @configurable
    def __init__(
        self,
        channels: int = 256,
        num_classes: int = 80,
        *,
        num_queries: int = 300,
        num_stages: int = 6,
        class_head: str = "focal",
        initial_boxes: str = "image",
        learn_initial_boxes: bool = True,
        num_heads: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        pooling_size: int = 7,
        sampling_ratio: int = 2,
        canonical_size: float = 224,
        dynamic_dim: int = 64,
        dynamic_filter: str = "bottleneck",
        checkpoint_stages: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_stages = checkpoint_stages
        self.query_embed = nn.Embedding(num_queries, channels)
        if initial_boxes not in INITIAL_BOXES:
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.DECODER.INITIAL_BOXES is {initial_boxes!r}; "
                f"wants one of {sorted(INITIAL_BOXES)}."
            )
        boxes = INITIAL_BOXES[initial_boxes](num_queries)
        if learn_initial_boxes:
            self.initial_boxes = nn.Parameter(boxes)
        else:
            self.register_buffer("initial_boxes", boxes)
        self.stages = nn.ModuleList(
            DynamicDecoderStage(
                channels,
                num_logits=num_classes + (class_head == "softmax"),
                prior=0.01 if class_head == "focal" else None,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                pooling_size=pooling_size,
                sampling_ratio=sampling_ratio,
                canonical_size=canonical_size,
                dynamic_dim=dynamic_dim,
                dynamic_filter=dynamic_filter,
            )
            for _ in range(num_stages)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.DYNAMIC_DETR
        decoder = node.DECODER
        return {
            "channels": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "num_queries": node.NUM_QUERIES,
            "num_stages": decoder.NUM_STAGES,
            "class_head": node.CLASS_HEAD,
            "initial_boxes": decoder.INITIAL_BOXES,
            "learn_initial_boxes": decoder.LEARN_INITIAL_BOXES,
            "num_heads": decoder.NUM_HEADS,
            "ffn_dim": decoder.FFN_DIM,
            "dropout": decoder.DROPOUT,
            "pooling_size": decoder.POOLING_SIZE,
            "sampling_ratio": decoder.SAMPLING_RATIO,
            "canonical_size": decoder.CANONICAL_SIZE,
            "dynamic_dim": decoder.DYNAMIC_DIM,
            "dynamic_filter": decoder.DYNAMIC_FILTER,
            "checkpoint_stages": node.CHECKPOINT.DECODER_STAGES,
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """One prediction per stage, the last one final."""
        batch = pyramid.image_sizes.shape[0]
        queries = self.query_embed.weight.expand(batch, -1, -1)
        dtype = torch.promote_types(self.initial_boxes.dtype, torch.float32)
        boxes = self.initial_boxes.to(dtype).expand(batch, -1, -1)
        predictions = []
        recompute = self.checkpoint_stages and self.training
        for stage in self.stages:
            if recompute:
                queries, logits, boxes = checkpoint(
                    stage, pyramid, queries, boxes, use_reentrant=False
                )
            else:
                queries, logits, boxes = stage(pyramid, queries, boxes)
            predictions.append(Prediction(logits, boxes))
            boxes = boxes.detach()
        return predictions
