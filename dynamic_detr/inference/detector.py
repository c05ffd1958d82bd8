"""Loading a trained detector and calling it on images.

detector = dynamic_detr.load("output/model_best.safetensors")
detector("photo.jpg").show()
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..config import CLASS_COUNTS, class_count
from ..data.augmentation import ResizeShortestEdge
from ..data.scenes import register_scenes_of
from ..engine.threshold import DEFAULT_THRESHOLD
from ..errors import UserError, did_you_mean
from ..files.config_file import read_config
from ..files.model_file import ModelInfo, is_model_file, read_header, require_model
from ..visualization.stages import follow_queries
from .building import build_with_weights
from .detections import Detections
from .pictures import Picture, WrongPicture, collect

__all__ = ["Detector", "load", "require_stages"]

logger = logging.getLogger(__name__)


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    threshold: float | None = None,
) -> Detector:
    """Load a detector from a model file.

    Args:
        source: a model file of a training run (``model_best.safetensors``), or the name of a
            shipped detector, such as "quickstart". For other weights see `Detector.from_config`.
        device: device of the model; by default a GPU if there is one.
        threshold: minimum score of a detection; by default the one with the best F1 in the
            detector's evaluation, which the file holds.

    Raises:
        UserError: the file does not exist, is damaged or is not a model file, or the device does
            not exist.
    """
    source = os.fspath(source)
    if not is_model_file(source):
        require_model(source)
        raise UserError(
            f"{source} is not a model file (*.safetensors); use Detector.from_config(cfg) for "
            "other weights"
        )
    cfg = read_config(source, [])
    cfg.MODEL.DEVICE = str(device or cfg.MODEL.DEVICE)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device is {cfg.MODEL.DEVICE!r}, but no GPU is available")
    return Detector.from_config(cfg, threshold=threshold)


def require_stages(architecture: str) -> None:
    """Check that a meta-architecture has decoder stages.

    Args:
        architecture: name as in `MODEL.META_ARCHITECTURE`.

    Raises:
        UserError: it has none.
    """
    if CLASS_COUNTS.get(architecture) != "SET_DETECTOR":
        raise UserError(
            f"decoder stages need MODEL.META_ARCHITECTURE SetDetector, got {architecture}"
        )


class Detector:
    """Callable detector for images, from any Detectron2 model that outputs instances.

    Detectron2's `DefaultPredictor` takes one BGR array at a time.

    Args:
        model: the model, which is set to evaluation mode.
        class_names: class names by class index.
        category_ids: ids in the annotations by class index; None for 1, 2, ...
        threshold: minimum score of a detection.
        min_size: the shorter side is scaled to this size in pixels; 0 for no scaling.
        max_size: upper bound of the longer side after scaling.
        image_format: format that the model expects, as in INPUT.FORMAT: "RGB", "BGR", "L" or
            "YUV-BT.601".
        cfg: configuration of the model; `evaluate` needs it.
        info: header of the model file, if there is one.

    Raises:
        UserError: threshold is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str] = (),
        category_ids: Sequence[int] | None = None,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        min_size: int = 800,
        max_size: int = 1333,
        image_format: str = "BGR",
        cfg: CfgNode | None = None,
        info: ModelInfo | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold is {threshold}; it must be between 0 and 1")
        self.model = model.eval()
        self.class_names = list(class_names)
        self.category_ids = list(category_ids or range(1, len(self.class_names) + 1))
        self.threshold = threshold
        self.resize = ResizeShortestEdge([min_size, min_size], max_size)
        self.image_format = image_format
        self.cfg, self.info = cfg, info
        self.metadata = Metadata(thing_classes=self.class_names)

    @classmethod
    def from_config(cls, cfg: CfgNode, *, threshold: float | None = None) -> Detector:
        """Build a detector with `build_with_weights`.

        Class names are those of the weights, else those of `DATASETS.TEST` if their number fits,
        else numbers.

        Args:
            cfg: configuration of the detector.
            threshold: minimum score of a detection; by default the model file's, or 0.5.

        Raises:
            UserError: see `build_with_weights`.
        """
        info = read_header(cfg.MODEL.WEIGHTS) if is_model_file(cfg.MODEL.WEIGHTS) else None
        model, rest = build_with_weights(cfg)
        names, ids = _classes(cfg, rest.get("class_names"))
        known = info.threshold if info else None
        if threshold is None:
            threshold = DEFAULT_THRESHOLD if known is None else known
        return cls(
            model,
            names,
            (info.category_ids if info else None) or ids,
            threshold=threshold,
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
            image_format=cfg.INPUT.FORMAT,
            cfg=cfg,
            info=info,
        )

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"<{name} of {len(self.class_names)} classes, scores from {self.threshold:.3g}>"

    def __call__(
        self,
        source: Any,
        *,
        threshold: float | None = None,
        channel_order: str = "RGB",
        batch_size: int = 1,
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detect objects in one or several images.

        Args:
            source: one or several images; see `collect`.
            threshold: minimum score of a detection; None for the detector's.
            channel_order: channel order of arrays and tensors, "RGB" or "BGR".
            batch_size: number of images per forward pass.

        Returns:
            The detections of one image; a list for a folder, a pattern, a list or a batch; an
            iterator, as of `stream`, for a video.

        Raises:
            UserError: the source is not an image or cannot be read.
        """
        pictures = collect(source, channel_order)
        stream = self._stream(pictures, threshold, batch_size, progress=False, on_error=None)
        if pictures.is_stream:
            return stream
        if pictures.is_one:
            return next(stream)
        return [found.without_image() if found.path else found for found in stream]

    def stream(
        self,
        source: Any,
        *,
        threshold: float | None = None,
        channel_order: str = "RGB",
        batch_size: int = 1,
        progress: bool | None = None,
        on_error: Callable[[Picture, UserError], None] | None = None,
    ) -> Iterator[Detections]:
        """Detect objects in any number of images without keeping them in memory.

        Args:
            source: as for a call.
            threshold: as for a call.
            channel_order: as for a call.
            batch_size: as for a call.
            progress: show a progress bar; by default in a terminal.
            on_error: called for each image that cannot be read, which is then skipped; by default
                the error is raised.

        Yields:
            The detections of each image, in order.
        """
        pictures = collect(source, channel_order)
        return self._stream(pictures, threshold, batch_size, progress, on_error)

    def _stream(self, pictures, threshold, batch_size, progress, on_error) -> Iterator[Detections]:
        if batch_size < 1:
            raise WrongPicture(f"batch_size is {batch_size}; it must be 1 or more")
        threshold = self.threshold if threshold is None else threshold
        items = _read(pictures.items, on_error)
        hidden = None if progress is None else not progress
        with tqdm(total=pictures.total, unit="image", disable=hidden) as bar:
            while batch := list(islice(items, batch_size)):
                found = self.detect([image for _, image in batch])
                for (picture, image), instances in zip(batch, found, strict=True):
                    yield Detections(self, picture, instances, threshold, image)
                    bar.update()

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Run the model on a batch.

        Args:
            images: B arrays (H, W, 3) uint8, RGB.

        Returns:
            B `Instances` on the CPU, in pixels of the image, by descending score.

        Raises:
            UserError: the model does not output instances (semantic segmentation, proposals).
        """
        outputs = self.model([self._input(image) for image in images])
        for output in outputs:
            if "instances" not in output:
                raise UserError(
                    "expected a model that outputs instances, got "
                    f"{', '.join(output) or 'no outputs'}; use the configuration of a box detector"
                )
        return [output["instances"].to("cpu") for output in outputs]

    def follow(
        self, image: np.ndarray, threshold: float, wanted: Collection[int] | None = None
    ) -> list[Instances]:
        """Return the same queries at every decoder stage, as `follow_queries` does.

        Args:
            image: (H, W, 3) uint8, RGB.
            threshold: minimum score at the last stage.
            wanted: indices of the classes at the last stage; None for all.

        Raises:
            UserError: the detector has no decoder stages.
        """
        require_stages(type(self.model).__name__)
        _, predictions = self.model.predict([self._input(image)])
        return follow_queries(
            predictions,
            image.shape[:2],
            self.model.class_head,
            threshold,
            nms_threshold=self.model.nms_threshold,
            wanted=wanted,
        )

    def class_indices(self, names: Sequence[str]) -> set[int]:
        """Return the indices of classes.

        Raises:
            UserError: a class does not exist.
        """
        for name in names:
            if name not in self.class_names:
                hint = did_you_mean(name, self.class_names)
                known = ", ".join(self.class_names[:10])
                more = ", ..." if len(self.class_names) > 10 else ""
                raise UserError(f"the detector has no class {name!r}{hint}; it has {known}{more}")
        return {index for index, name in enumerate(self.class_names) if name in names}

    def evaluate(
        self, json_file: str | os.PathLike[str], images: str | os.PathLike[str]
    ) -> dict[str, float]:
        """Compute COCO's metrics, as `train_net.py --eval-only` does.

        Categories are paired with the detector's classes by name.

        Args:
            json_file: annotations in COCO format.
            images: folder of the images.

        Returns:
            AP, AP50, ... and the AP of each class in percent; the threshold with the best F1, and
            that F1 in percent.

        Raises:
            UserError: the annotations cannot be used, or have classes that the detector lacks.
        """
        from ..data.coco_json import apply_json_datasets
        from ..engine.trainer import Trainer

        if self.cfg is None:
            raise UserError("cfg is None; evaluate needs the configuration of the detector")
        cfg = copy.deepcopy(self.cfg)
        cfg.defrost()
        args = Namespace(train_json=None, train_images=None, eval_only=True)
        args.val_json, args.val_images = os.fspath(json_file), os.fspath(images)
        with tempfile.TemporaryDirectory() as folder:
            cfg.OUTPUT_DIR = folder
            apply_json_datasets(cfg, args, self.class_names)
            return Trainer.test(cfg, self.model)["bbox"]

    def _input(self, image: np.ndarray) -> dict:
        image = convert_PIL_to_numpy(Image.fromarray(image), self.image_format)
        height, width = image.shape[:2]
        transform = self.resize.get_transform(image)
        pixels = np.ascontiguousarray(transform.apply_image(image).transpose(2, 0, 1))
        tensor = torch.as_tensor(pixels.astype(np.float32))
        return {"image": tensor, "height": height, "width": width}


def _read(pictures, on_error) -> Iterator[tuple[Picture, np.ndarray]]:
    for picture in pictures:
        try:
            image = picture.read()
        except UserError as error:
            if on_error is None:
                raise
            on_error(picture, error)
        else:
            yield picture, image


def _classes(cfg: CfgNode, saved: list[str] | None) -> tuple[list[str], list[int] | None]:
    """Return the class names, and their category ids if `DATASETS.TEST` defines them."""
    register_scenes_of(cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    known = metadata.get("thing_classes")
    names, count = saved or known, class_count(cfg)
    if names is not None and count is not None and len(names) != count:
        logger.warning(
            f"the detector has {count} classes and {len(names)} names are known "
            "(DATASETS.TEST): classes are shown by number"
        )
        names = None
    if names is None:
        return [f"class {k}" for k in range(count or 0)], None
    indices = metadata.get("thing_dataset_id_to_contiguous_id") if names == known else None
    ids = sorted(indices, key=indices.get) if indices else None
    return list(names), ids if ids and len(ids) == len(names) else None
