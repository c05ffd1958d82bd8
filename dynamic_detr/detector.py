"""The meta-architecture of Figure 2: backbone, encoder, decoder and set loss."""

import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from . import compat
from .backbones import checkpoint_resnet_stages, freeze_unused
from .config import check_arguments
from .decoders import build_decoder
from .encoders import build_encoder
from .errors import UserError
from .layers import class_scores
from .losses import SetCriterion, Target
from .runtime.compilation import compile_network
from .runtime.cuda_graphs import GraphCache
from .runtime.transfers import to_device
from .structures import Prediction, Pyramid

__all__ = ["DynamicDETR", "SetDetector", "UnknownClassError"]


class UnknownClassError(UserError, ValueError):
    """Annotation with a class index outside [0, NUM_CLASSES)."""


@META_ARCH_REGISTRY.register()
class SetDetector(nn.Module):
    """An end-to-end detector: image → backbone → encoder → decoder → set of boxes.

    Args:
        backbone: Detectron2 backbone.
        in_features: names of the backbone's outputs that form the pyramid, fine to coarse.
        encoder: `forward(pyramid) -> pyramid`.
        decoder: `forward(pyramid) -> list[Prediction]`, see `DECODER_REGISTRY`.
        criterion: `forward(predictions, targets) -> dict of losses`.
        hidden_dim: C, number of channels of the pyramid.
        num_classes: K.
        class_head: "focal" or "softmax", see `ClassHead`.
        pixel_mean: mean of each input channel.
        pixel_std: standard deviation of each input channel.
        max_detections: largest number of boxes per image.
        cuda_graphs: number of input sizes with a CUDA graph of the network, for inference on a GPU;
            0 for no graphs. See `GraphCache`.
        compile_backend: backend of `torch.compile` for inference; None to run without compilation.
        nms_threshold: IoU, in (0, 1], above which the lower-scoring of two boxes of a class is left
            out; 1 for no non-maximum suppression.

    Raises:
        ValueError: an argument is out of range, or names, channels or strides of the backbone's
            outputs do not fit.
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
        max_detections: int,
        cuda_graphs: int,
        compile_backend: str | None,
        nms_threshold: float,
    ) -> None:
        super().__init__()
        check_arguments(
            "MODEL.SET_DETECTOR",
            in_features=list(in_features),
            num_classes=num_classes,
            class_head=class_head,
        )
        check_arguments(
            "MODEL.SET_DETECTOR.INFERENCE", cuda_graphs=cuda_graphs, nms_threshold=nms_threshold
        )
        shapes = backbone.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.SET_DETECTOR.IN_FEATURES names {missing}; the backbone has {list(shapes)}."
            )
        channels = {shapes[name].channels for name in in_features}
        if channels != {hidden_dim}:
            raise ValueError(
                f"MODEL.SET_DETECTOR.HIDDEN_DIM is {hidden_dim}, but the backbone's levels have "
                f"{sorted(channels)} channels: set MODEL.FPN.OUT_CHANNELS (or "
                f"MODEL.LEVELS.OUT_CHANNELS) to {hidden_dim}."
            )
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.in_features = tuple(in_features)
        self.strides = tuple(shapes[name].stride for name in in_features)
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.strides)):
            raise ValueError(
                "MODEL.SET_DETECTOR.IN_FEATURES: expected neighbouring levels, fine to coarse, got "
                f"{list(in_features)} with strides {list(self.strides)}."
            )
        freeze_unused(self.backbone, self.in_features, channels=len(pixel_mean))
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.class_head = class_head
        self.max_detections = max_detections
        self.cuda_graphs = cuda_graphs
        self.compile_backend = compile_backend
        self.nms_threshold = nms_threshold
        self._inference: Callable[[Tensor, Tensor], list[Prediction]] | None = None
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.SET_DETECTOR
        backbone = build_backbone(cfg)
        if node.ACTIVATION_CHECKPOINT.BACKBONE:
            checkpoint_resnet_stages(backbone)
        inference = node.INFERENCE
        if inference.CUDA_GRAPHS and not cfg.MODEL.DEVICE.startswith("cuda"):
            # no error: the results are the same, and the config may come from another machine
            warnings.warn(
                f"MODEL.SET_DETECTOR.INFERENCE.CUDA_GRAPHS is {inference.CUDA_GRAPHS}, but "
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: the network runs without.",
                stacklevel=2,
            )
        return {
            "backbone": backbone,
            "in_features": node.IN_FEATURES,
            "encoder": build_encoder(cfg),
            "decoder": build_decoder(cfg),
            "criterion": SetCriterion.from_config(cfg),
            "hidden_dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "class_head": node.CLASS_HEAD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "cuda_graphs": inference.CUDA_GRAPHS,
            "compile_backend": "inductor" if inference.COMPILE else None,
            "nms_threshold": inference.NMS_THRESHOLD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Return the losses in training mode, or else the detections.

        Args:
            batched_inputs: for each image "image" (C, H, W); in training also "instances" with
                gt_boxes (corners in pixels of the image) and gt_classes; at inference optionally
                "height" and "width" of the output in pixels, by default those of the image.

        Returns:
            In training the losses of `SetCriterion`; else for each image {"instances":
            Instances} with pred_boxes (corners in pixels of the output), scores and pred_classes.

        Raises:
            UnknownClassError: a class in gt_classes is not in [0, K).
        """
        if self.training:
            targets = self._targets(batched_inputs)
            return self.criterion(self._predict(batched_inputs, targets)[1], targets)
        image_sizes, predictions = self.predict(batched_inputs)
        output_sizes = [
            (inputs.get("height", height), inputs.get("width", width))
            for inputs, (height, width) in zip(batched_inputs, image_sizes, strict=True)
        ]
        results = self.to_instances(predictions[-1], output_sizes)
        return [{"instances": result} for result in results]

    @torch.no_grad()
    def predict(self, batched_inputs: list[dict]) -> tuple[list[tuple[int, int]], list[Prediction]]:
        """Return the predictions of all stages, without gradient.

        Args:
            batched_inputs: see `forward`.

        Returns:
            The (height, width) of each input image in pixels, and one prediction per stage, the
            last one final.
        """
        return self._predict(batched_inputs)

    def _predict(
        self, batched_inputs: list[dict], targets: list[Target] | None = None
    ) -> tuple[list[tuple[int, int]], list[Prediction]]:
        images = self._images(batched_inputs)
        network = self._network if self.training else self._inference_network()
        inputs = [
            images.tensor.contiguous(memory_format=torch.channels_last),
            to_device(torch.tensor(images.image_sizes), self.device),
        ]
        if targets is not None and getattr(self.decoder, "needs_true_boxes", False):
            inputs.append([boxes for _, boxes in targets])
        predictions = network(*inputs)
        return images.image_sizes, predictions

    def _network(
        self, images: Tensor, image_sizes: Tensor, *true_boxes: list[Tensor]
    ) -> list[Prediction]:
        """Map padded images (B, 3, H, W) and their true sizes (B, 2) to predictions.

        In training, a decoder that needs them also gets the true boxes of each image.

        It never synchronises with the GPU, so it can be captured as a CUDA graph.
        """
        features = self.backbone(images)
        pyramid = Pyramid(
            [
                features[name].contiguous(memory_format=torch.channels_last)
                for name in self.in_features
            ],
            self.strides,
            image_sizes,
        )
        return self.decoder(self.encoder(pyramid), *true_boxes)

    def _inference_network(self) -> Callable[[Tensor, Tensor], list[Prediction]]:
        if self._inference is None:
            network = self._network
            if self.compile_backend is not None:
                network = compile_network(network, self.compile_backend)
            if self.cuda_graphs:
                network = GraphCache(network, self, self.cuda_graphs)
            self._inference = network
        return self._inference

    def train(self, mode: bool = True) -> "SetDetector":
        """Set the mode; training mode frees the memory of captured CUDA graphs."""
        if mode and isinstance(self._inference, GraphCache):
            self._inference.clear()
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Leave out the compiled or captured network, which belongs to the weights of this copy."""
        return {**super().__getstate__(), "_inference": None}

    def _images(self, batched_inputs: list[dict]) -> ImageList:
        images = [
            (to_device(inputs["image"], self.device) - self.pixel_mean) / self.pixel_std
            for inputs in batched_inputs
        ]
        return compat.batch_images(images, self.backbone)

    def _targets(self, batched_inputs: list[dict]) -> list[Target]:
        labels, boxes = [], []
        for inputs in batched_inputs:
            instances = inputs["instances"]
            # checked on the CPU: an index out of range on a GPU would abort the process
            unknown = [k for k in instances.gt_classes.tolist() if not 0 <= k < self.num_classes]
            if unknown:
                raise UnknownClassError(
                    f"{inputs.get('file_name', 'an image')} has an object of class {unknown[0]}, "
                    f"counted from 0, but MODEL.SET_DETECTOR.NUM_CLASSES is {self.num_classes}."
                )
            height, width = inputs["image"].shape[-2:]
            corners = instances.gt_boxes.tensor
            size = corners.new_tensor([width, height, width, height])
            labels.append(instances.gt_classes)
            boxes.append(box_convert(corners / size, "xyxy", "cxcywh"))
        counts = [len(part) for part in labels]
        # one transfer for the labels of all images, and one for the boxes
        labels = to_device(torch.cat(labels), self.device).split(counts)
        boxes = to_device(torch.cat(boxes), self.device).split(counts)
        return list(zip(labels, boxes, strict=True))

    def to_instances(self, prediction: Prediction, sizes: list[tuple[int, int]]) -> list[Instances]:
        """Return the best detections of each image, after non-maximum suppression if there is any.

        Boxes that are not finite or have no area within the image are left out. The host waits for
        the device once, for the number of boxes of each image, and with non-maximum suppression
        once more for each image.

        Args:
            prediction: prediction of one stage.
            sizes: (height, width) of each output in pixels.

        Returns:
            For each image at most `max_detections` instances by descending score, with pred_boxes
            (corners in pixels, clipped to the size), scores and pred_classes. A query may give
            several detections with the focal head, and at most one with the softmax head.
        """
        logits = prediction.pred_logits.float()
        scores = class_scores(logits, self.class_head)
        num_classes = scores.shape[-1]
        limits = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=logits.dtype)
        limits = to_device(limits, logits.device)[:, None]
        corners = box_convert(prediction.pred_boxes.float(), "cxcywh", "xyxy") * limits
        finite = corners.isfinite().all(dim=-1) & scores.isfinite().all(dim=-1)  # (B, Q)
        corners = torch.minimum(corners.clamp(min=0), limits)
        kept = finite & (corners[..., 2:] > corners[..., :2]).all(dim=-1)
        scores = scores.masked_fill(~kept[..., None], -1).flatten(1)  # (B, Q·K)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        query = index.div(num_classes, rounding_mode="floor")
        boxes = corners.take_along_dim(query[..., None], dim=1)
        classes = index % num_classes
        # boxes to leave out have the score -1, so they are last
        counts = (scores >= 0).sum(dim=1).tolist()
        results = [
            Instances(
                size,
                pred_boxes=Boxes(boxes[image, :count]),
                scores=scores[image, :count],
                pred_classes=classes[image, :count],
            )
            for image, (size, count) in enumerate(zip(sizes, counts, strict=True))
        ]
        if self.nms_threshold == 1:
            return results
        return [
            result[
                batched_nms(
                    result.pred_boxes.tensor, result.scores, result.pred_classes, self.nms_threshold
                )
            ]
            for result in results
        ]


@META_ARCH_REGISTRY.register()
class DynamicDETR(SetDetector):
    """`SetDetector` under the name of the paper's detector, which the default keys describe."""
