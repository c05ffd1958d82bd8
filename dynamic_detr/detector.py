"""The meta-architecture: backbone, encoder, decoder and set loss, as Figure 2 of the paper."""

from itertools import pairwise

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .decoders import build_decoder
from .encoders import build_encoder
from .errors import UserError
from .losses import build_criterion
from .losses.criterion import Target
from .structures import Prediction, Pyramid, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

__all__ = ["DynamicDETR", "UnknownClassError"]


class UnknownClassError(UserError, ValueError):
    """An annotation's class is not one of those that the detector tells apart."""


@META_ARCH_REGISTRY.register()
class DynamicDETR(nn.Module):
    """An end-to-end detector: image → backbone → encoder → decoder → set of boxes.

    Args:
        backbone: Detectron2 backbone, whose outputs are a dictionary of feature maps.
        in_features: its outputs that make the pyramid, fine to coarse.
        encoder: `forward(pyramid) -> pyramid`.
        decoder: `forward(pyramid) -> list[Prediction]`.
        criterion: `forward(predictions, targets) -> dict of losses`.
        num_classes: K.
        class_head: "focal" or "softmax".
        pixel_mean, pixel_std: of each channel of the input.
        max_detections: boxes returned for each image.

    Raises:
        ValueError: the backbone has no such outputs, or their channels or strides do not fit.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: list[str],
        encoder: nn.Module,
        decoder: nn.Module,
        criterion: nn.Module,
        hidden_dim: int,
        num_classes: int,
        class_head: str,
        pixel_mean: list[float],
        pixel_std: list[float],
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        shapes = backbone.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.IN_FEATURES names {missing}; the backbone has {list(shapes)}."
            )
        channels = {shapes[name].channels for name in in_features}
        if channels != {hidden_dim}:
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.HIDDEN_DIM is {hidden_dim}, but the backbone's levels have "
                f"{sorted(channels)} channels: set MODEL.FPN.OUT_CHANNELS to {hidden_dim}."
            )
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.in_features = tuple(in_features)
        self.strides = tuple(shapes[name].stride for name in in_features)
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.strides)):
            raise ValueError(
                f"MODEL.DYNAMIC_DETR.IN_FEATURES {list(in_features)} have strides "
                f"{list(self.strides)}; list neighbouring levels, fine to coarse."
            )
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.class_head = class_head
        self.max_detections = max_detections
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.DYNAMIC_DETR
        return {
            "backbone": build_backbone(cfg),
            "in_features": node.IN_FEATURES,
            "encoder": build_encoder(cfg),
            "decoder": build_decoder(cfg),
            "criterion": build_criterion(cfg),
            "hidden_dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "class_head": node.CLASS_HEAD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract.

        Args:
            batched_inputs: for each image "image" (C, H, W); in training also "instances" with
                gt_boxes (corners in pixels of the image) and gt_classes; at inference optionally
                "height" and "width" of the wanted output.

        Returns:
            In training the losses of `SetCriterion`; else for each image {"instances":
            Instances} with pred_boxes (corners in pixels of the output), scores, pred_classes.
        """
        if self.training:
            images, predictions = self._predict(batched_inputs)
            return self.criterion(predictions, self._targets(batched_inputs, images))
        image_sizes, predictions = self.predict(batched_inputs)
        results = self.to_instances(predictions[-1], image_sizes)
        return [
            {
                "instances": detector_postprocess(
                    result,
                    inputs.get("height", result.image_size[0]),
                    inputs.get("width", result.image_size[1]),
                )
            }
            for result, inputs in zip(results, batched_inputs, strict=True)
        ]

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> tuple[list[tuple[int, int]], list[Prediction]]:
        """What every stage says: sizes (height, width) of the images as the network saw them, and
        one prediction per stage, the last one final."""
        images, predictions = self._predict(batched_inputs)
        return images.image_sizes, predictions

    def _predict(self, batched_inputs: list[dict]) -> tuple[ImageList, list[Prediction]]:
        images = self._images(batched_inputs)
        features = self.backbone(images.tensor.contiguous(memory_format=torch.channels_last))
        pyramid = Pyramid(
            [
                features[name].contiguous(memory_format=torch.channels_last)
                for name in self.in_features
            ],
            self.strides,
            torch.tensor(images.image_sizes, device=self.device),
        )
        return images, self.decoder(self.encoder(pyramid))

    def _images(self, batched_inputs: list[dict]) -> ImageList:
        images = [
            (inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for inputs in batched_inputs
        ]
        divisibility = max(self.backbone.size_divisibility, *self.strides)
        return ImageList.from_tensors(images, divisibility)

    def _targets(self, batched_inputs: list[dict], images: ImageList) -> list[Target]:
        targets = []
        for inputs, (height, width) in zip(batched_inputs, images.image_sizes, strict=True):
            instances = inputs["instances"]
            # asked before they move: a wrong index on a GPU kills the process
            if len(instances) and int(instances.gt_classes.max()) >= self.num_classes:
                raise UnknownClassError(
                    f"{inputs.get('file_name', 'an image')} has an object of class "
                    f"{int(instances.gt_classes.max())}, counted from 0, but "
                    f"MODEL.DYNAMIC_DETR.NUM_CLASSES is {self.num_classes}."
                )
            instances = instances.to(self.device)
            size = torch.tensor([width, height, width, height], device=self.device)
            boxes = box_xyxy_to_cxcywh(instances.gt_boxes.tensor / size)
            targets.append((instances.gt_classes, boxes))
        return targets

    def to_instances(
        self, prediction: Prediction, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best boxes of each image, without non-maximum suppression.

        Args:
            prediction: of any stage.
            image_sizes: (height, width) of each image in pixels.

        Returns:
            For each image at most `max_detections` boxes (corners in pixels of the image), best
            first. A query may answer for several classes, as in Deformable DETR, with the focal
            head. What is not finite is left out.
        """
        logits = prediction.pred_logits.float()
        scores = logits.sigmoid() if self.class_head == "focal" else logits.softmax(-1)[..., :-1]
        num_classes = scores.shape[-1]
        sizes = torch.tensor([(w, h, w, h) for h, w in image_sizes], device=logits.device)
        corners = box_cxcywh_to_xyxy(prediction.pred_boxes.float()) * sizes[:, None]
        finite = corners.isfinite().all(dim=-1) & scores.isfinite().all(dim=-1)  # (B, Q)
        scores = scores.masked_fill(~finite[..., None], -1).flatten(1)  # (B, Q·K)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        results = []
        for image, size in enumerate(image_sizes):
            kept = scores[image] >= 0
            best = index[image][kept]
            boxes = Boxes(corners[image, best // num_classes])
            boxes.clip(size)
            results.append(
                Instances(
                    size,
                    pred_boxes=boxes,
                    scores=scores[image][kept],
                    pred_classes=best % num_classes,
                )
            )
        return results
