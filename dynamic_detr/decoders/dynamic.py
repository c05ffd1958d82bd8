"""The dynamic decoder (equations 8 to 14): learned queries and boxes, refined stage by stage
from the whole image down to the object."""

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

    Every stage predicts and is supervised; its boxes go to the next stage without gradient. With
    dense queries, which have boxes and logits, stages correct the logits as they correct the boxes:
    they add to those of the stage before, without gradient to it.

    Args:
        channels: C, of the queries and of the pyramid.
        num_classes: K.
        num_queries: Q.
        num_stages: S.
        class_head: "focal" or "softmax", see `ClassHead`.
        dense_queries: gives the first boxes and queries; None for learned ones, as the paper, which
            the next two arguments describe.
        initial_boxes: where the first boxes start; "image": the whole image each, as the paper;
            "grid": see `grid_boxes`.
        learn_initial_boxes: whether the first boxes are parameters, or stay where they start.
        checkpoint_stages: in training, keep only the inputs of each stage and compute it again in
            the backward pass.
        num_heads, ffn_dim, dropout, pooling_size, sampling_ratio, canonical_size, dynamic_dim,
            dynamic_filter: see `DynamicDecoderStage`.

    Raises:
        ValueError: an argument is out of its key's range, or the heads do not divide the channels.
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
        if dense_queries is not None:  # stages start by hardly changing the logits that they get
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
        """That of the dense queries, if there are any, then one prediction per stage, the last one
        final."""
        batch = pyramid.image_sizes.shape[0]
        if self.dense_queries is None:
            queries = self.query_embed.weight.expand(batch, -1, -1)
            dtype = torch.promote_types(self.initial_boxes.dtype, torch.float32)
            boxes = self.initial_boxes.to(dtype).expand(batch, -1, -1)
            earlier, predictions = None, []
        else:
            start = self.dense_queries(pyramid)
            queries, boxes, earlier = start.content, start.boxes, start.logits
            if self.class_head == "softmax":  # "no object" as likely as a sigmoid of 1/2
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
