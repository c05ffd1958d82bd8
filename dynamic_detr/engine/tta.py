"""Test-time augmentation for any detector: several sizes, with and without flip, merged by NMS.

Detectron2's ``GeneralizedRCNNWithTTA`` needs the heads of one meta-architecture; this needs only
the boxes of a detector.
"""

import os

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

NMS_THRESHOLD = 0.5


class DetectorTTA(nn.Module):
    """Detector over several views of each image; merges boxes, not masks.

    Views are made from the file of an image if ``file_name`` is given, so that no image is resized
    twice.

    Args:
        model: any Detectron2 detector, in evaluation mode when called.
        mapper: returns views of an image and their transforms (``TEST.AUG.*``).
        image_format: format to read images in, ``INPUT.FORMAT``.
        max_detections: largest number of boxes per image.
    """

    def __init__(
        self, model: nn.Module, mapper: DatasetMapperTTA, image_format: str, max_detections: int
    ):
        super().__init__()
        self.model = model
        self.mapper = mapper
        self.image_format = image_format
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "DetectorTTA":
        """Read ``TEST.AUG``, ``INPUT.FORMAT`` and ``TEST.DETECTIONS_PER_IMAGE``."""
        return cls(model, DatasetMapperTTA(cfg), cfg.INPUT.FORMAT, cfg.TEST.DETECTIONS_PER_IMAGE)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Return boxes in pixels of ``height`` × ``width``, as the model itself does."""
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: dict) -> Instances:
        inputs = self._with_original_image(inputs)
        found = [self._detect_view(view) for view in self.mapper(inputs)]
        boxes, scores, classes = (torch.cat(part) for part in zip(*found, strict=True))
        keep = batched_nms(boxes, scores, classes, NMS_THRESHOLD)[: self.max_detections]
        size = (inputs["height"], inputs["width"])
        merged = Boxes(boxes[keep])
        merged.clip(size)
        return Instances(size, pred_boxes=merged, scores=scores[keep], pred_classes=classes[keep])

    def _with_original_image(self, inputs: dict) -> dict:
        image = inputs["image"]
        size = (inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2]))
        if os.path.isfile(inputs.get("file_name", "")):
            pixels = read_image(inputs["file_name"], self.image_format)
            image = torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return {"image": image, "height": size[0], "width": size[1]}

    def _detect_view(self, view: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, 4), scores (N,) and classes (N,).

        Boxes are corners in pixels of the original image.
        """
        to_view = view.pop("transforms")
        view["height"], view["width"] = view["image"].shape[1:]
        instances = self.model([view])[0]["instances"]
        boxes = instances.pred_boxes.tensor
        original = to_view.inverse().apply_box(boxes.cpu().numpy())
        original = torch.as_tensor(original, dtype=boxes.dtype, device=boxes.device)
        return original.reshape(-1, 4), instances.scores, instances.pred_classes
