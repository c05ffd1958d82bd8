"""Dynamic decoder (equations 8 to 14): every stage refines the previous queries and boxes."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..config import check_arguments
from ..layers import apply_layer
from ..structures import Prediction, Pyramid
from .build import DECODER_REGISTRY
from .denoising import noised_copies
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

    Each stage refines the detached boxes of the previous stage.

    Args:
        channels: C.
        num_classes: K.
        num_queries: Q.
        num_stages: S.
        class_head: "focal" or "softmax", see `ClassHead`.
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
        classify_true_boxes: in training, classify also the regions of the true boxes in each stage;
            see `forward`.
        noised_boxes: number N of noised copies per image, shared among its true boxes, which each
            stage refines in training; see `forward`.
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
        classify_true_boxes: bool,
        noised_boxes: int,
        checkpoint_stages: bool,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.DYNAMIC_DECODER",
            num_queries=num_queries,
            num_stages=num_stages,
            initial_boxes=initial_boxes,
            learn_initial_boxes=learn_initial_boxes,
            classify_true_boxes=classify_true_boxes,
            noised_boxes=noised_boxes,
        )
        self.classify_true_boxes = classify_true_boxes
        self.noised_boxes = noised_boxes
        self.needs_true_boxes = classify_true_boxes or noised_boxes > 0
        self.checkpoint_stages = checkpoint_stages
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

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        detector = cfg.MODEL.SET_DETECTOR
        return {
            "channels": detector.HIDDEN_DIM,
            "num_classes": detector.NUM_CLASSES,
            "class_head": detector.CLASS_HEAD,
            "checkpoint_stages": detector.ACTIVATION_CHECKPOINT.DECODER,
            **{name.lower(): value for name, value in cfg.MODEL.DYNAMIC_DECODER.items()},
        }

    def forward(
        self, pyramid: Pyramid, true_boxes: Sequence[Tensor] | None = None
    ) -> list[Prediction]:
        """Return one prediction per stage, the last one final.

        Given true boxes, every stage also classifies their regions (`classify_true_boxes`) and
        refines noised copies of them (`noised_boxes`). The query of a true box or of a copy starts
        as the mean of the learned queries, attends to itself alone, and goes from stage to stage
        like the others. True boxes are not refined.

        Args:
            pyramid: output of the encoder.
            true_boxes: (T_b, 4) cx, cy, w, h, normalised, for each image. None at inference.
        """
        batch = pyramid.image_sizes.shape[0]
        queries = self.query_embed.weight.expand(batch, -1, -1)
        dtype = torch.promote_types(self.initial_boxes.dtype, torch.float32)
        boxes = self.initial_boxes.to(dtype).expand(batch, -1, -1)
        true = noised = boxes[:, :0]
        objects = None
        if true_boxes is not None and self.classify_true_boxes:
            true = pad_sequence(list(true_boxes), batch_first=True, padding_value=0.5).to(dtype)
        if true_boxes is not None and self.noised_boxes:
            noised, objects = noised_copies(true_boxes, self.noised_boxes)
        sizes = [boxes.shape[1], true.shape[1], noised.shape[1]]
        apart = sizes[1] + sizes[2]
        if apart:
            mean = self.query_embed.weight.mean(0).expand(batch, apart, -1)
            queries = torch.cat([queries, mean], dim=1)
        predictions = []
        recompute = self.checkpoint_stages and self.training
        for stage in self.stages:
            if apart:
                boxes = torch.cat([boxes, true, noised.to(dtype)], dim=1)
            queries, logits, boxes = apply_layer(
                stage, pyramid, queries, boxes, apart, recompute=recompute
            )
            if true_boxes is None:
                predictions.append(Prediction(logits, boxes))
            else:
                logits, true_logits, _ = logits.split(sizes, dim=1)
                boxes, _, noised = boxes.split(sizes, dim=1)
                extra = {"true_logits": true_logits} if self.classify_true_boxes else {}
                if self.noised_boxes:
                    extra |= {"noised_boxes": noised, "noised_objects": objects}
                predictions.append(Prediction(logits, boxes, **extra))
                noised = noised.detach()
            boxes = boxes.detach()
        return predictions
