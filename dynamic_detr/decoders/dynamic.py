"""Dynamic decoder (equations 8 to 14): every stage refines the previous queries and boxes."""

import math

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..config import check_arguments
from ..layers import apply_layer
from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY
from .dense_queries import DenseQueries
from .dynamic_stage import DynamicDecoderStage

__all__ = ["DynamicDecoder"]


def image_boxes(count: int) -> Tensor:
    """Return `count` boxes of the whole image: (count, 4) cx, cy, w, h, normalised."""
    return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)


def grid_boxes(count: int) -> Tensor:
    """Return squares at the cells of a square grid, twice as wide as the cells.

    The grid is the smallest with at least `count` cells; surplus cells are left out at equal
    intervals.

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
    """Stack of decoder stages with one prediction per stage.

    Each stage refines the detached boxes of the previous stage. With dense queries, which have
    logits too, each stage also adds its logits to the detached logits of the previous stage.

    Args:
        channels: C.
        num_classes: K.
        num_queries: Q.
        num_stages: S.
        class_head: "focal" or "softmax", see `ClassHead`.
        dense_queries: module that computes the initial queries and boxes; None for learned ones, as
            in the paper.
        initial_boxes: initial value of the learned boxes: "image" for the whole image, as in the
            paper, or "grid", see `grid_boxes`.
        learn_initial_boxes: True if the initial boxes are parameters, False if they are constant.
        num_heads: see `DynamicDecoderStage`.
        ffn_dim: see `DynamicDecoderStage`.
        dropout: see `DynamicDecoderStage`.
        pooling_size: see `DynamicDecoderStage`.
        sampling_ratio: see `DynamicDecoderStage`.
        canonical_size: see `DynamicDecoderStage`.
        dynamic_dim: see `DynamicDecoderStage`.
        dynamic_filter: see `DynamicDecoderStage`.
        checkpoint_stages: recompute each stage in the backward pass of training.

    Raises:
        ValueError: an argument is out of range, or the heads do not divide the channels.
    """

    @configurable
    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_queries: int,
        num_stages: int,
        class_head: str,
        dense_queries: DenseQueries | None,
        initial_boxes: str,
        learn_initial_boxes: bool,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        pooling_size: int,
        sampling_ratio: int,
        canonical_size: float,
        dynamic_dim: int,
        dynamic_filter: str,
        checkpoint_stages: bool,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.DYNAMIC_DECODER",
            num_queries=num_queries,
            num_stages=num_stages,
            initial_boxes=initial_boxes,
            learn_initial_boxes=learn_initial_boxes,
        )
        self.class_head = class_head
        self.checkpoint_stages = checkpoint_stages
        self.dense_queries = dense_queries
        if dense_queries is None:
            self.query_embed = nn.Embedding(num_queries, channels)
            boxes = INITIAL_BOXES[initial_boxes](num_queries)
            if learn_initial_boxes:
                self.initial_boxes = nn.Parameter(boxes)
            else:
                self.register_buffer("initial_boxes", boxes)
        self.stages = nn.ModuleList(
            DynamicDecoderStage(
                channels,
                num_classes,
                class_head,
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
        if dense_queries is not None:  # at first, stages hardly change the logits of the queries
            for stage in self.stages:
                nn.init.normal_(stage.class_logits.weight, std=0.01)
                nn.init.zeros_(stage.class_logits.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector = cfg.MODEL.SET_DETECTOR
        decoder = {name.lower(): value for name, value in cfg.MODEL.DYNAMIC_DECODER.items()}
        dense = decoder.pop("queries") == "dense"
        return {
            "channels": detector.HIDDEN_DIM,
            "num_classes": detector.NUM_CLASSES,
            "class_head": detector.CLASS_HEAD,
            "checkpoint_stages": detector.ACTIVATION_CHECKPOINT.DECODER,
            "dense_queries": DenseQueries(cfg) if dense else None,
            **decoder,
        }

    def forward(self, pyramid: Pyramid) -> list[Prediction]:
        """Return the dense prediction, if any, and one prediction per stage, the last one final."""
        batch = pyramid.image_sizes.shape[0]
        if self.dense_queries is None:
            queries = self.query_embed.weight.expand(batch, -1, -1)
            dtype = torch.promote_types(self.initial_boxes.dtype, torch.float32)
            boxes = self.initial_boxes.to(dtype).expand(batch, -1, -1)
            earlier, predictions = None, []
        else:
            start = self.dense_queries(pyramid)
            queries, boxes, earlier = start.content, start.boxes, start.logits
            if self.class_head == "softmax":  # "no object" has logit 0, a sigmoid of 1/2
                earlier = F.pad(earlier, (0, 1))
            predictions = [start.dense]
        recompute = self.checkpoint_stages and self.training
        for stage in self.stages:
            queries, logits, boxes = apply_layer(
                stage, pyramid, queries, boxes, recompute=recompute
            )
            if earlier is not None:
                logits = logits + earlier
                earlier = logits.detach()
            predictions.append(Prediction(logits, boxes))
            boxes = boxes.detach()
        return predictions
