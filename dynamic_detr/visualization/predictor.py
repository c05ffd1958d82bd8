"""A detector with its weights and its test-time resizing: pictures in, instances out."""

import logging

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from torch import nn

from ..config import CLASS_COUNTS, class_count
from ..data.augmentation import ResizeShortestEdge
from ..engine.checkpoint import SafeCheckpointer
from ..engine.reading import require_finite
from ..engine.setup import build_detector
from ..errors import UserError
from .stages import MAX_QUERIES, follow_queries

__all__ = ["Predictor", "require_stages"]

logger = logging.getLogger(__name__)


def require_stages(architecture: str) -> None:
    """See that a meta-architecture, named as in `MODEL.META_ARCHITECTURE`, has decoder stages.

    Raises:
        UserError: it has none.
    """
    if CLASS_COUNTS.get(architecture) != "SET_DETECTOR":
        raise UserError(
            f"--stages draws the decoder stages of a SetDetector, and this is {architecture}; "
            "leave it out"
        )


class _Checkpointer(SafeCheckpointer):
    """Loads weights that must fit, and says in one line which do not."""

    def __init__(self, model: nn.Module):
        super().__init__(model, strict_classes=True)

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible._replace(missing_keys=[], unexpected_keys=[]))
        if missing := incompatible.missing_keys:
            logger.warning(
                f"{len(missing)} of the detector's tensors are not in the weights (such as "
                f"{missing[0]}) and stay random: expect no sensible boxes"
            )


class Predictor:
    """Detects in one picture at a time, as Detectron2's `DefaultPredictor` does.

    Args:
        model: any detector of Detectron2 that finds instances; used in evaluation mode.
        min_size, max_size: the shorter side is scaled to min_size pixels (0: as it is), the longer
            is at most max_size.
        image_format: "RGB" or "BGR", what the model wants.
        metadata: Detectron2's, for the names of the classes.

    Raises:
        UserError: image_format is neither.
    """

    def __init__(
        self,
        model: nn.Module,
        min_size: int = 800,
        max_size: int = 1333,
        image_format: str = "BGR",
        metadata: Metadata | None = None,
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT is {image_format!r}; the demo knows RGB and BGR")
        self.model = model.eval()
        self.resize = ResizeShortestEdge([min_size, min_size], max_size)
        self.image_format = image_format
        self.metadata = metadata or Metadata()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Predictor":
        """Builds `MODEL`, loads `MODEL.WEIGHTS` (a path, `detectron2://` or `https://`).

        Without a GPU it runs on the CPU and says so. Class names are those that the checkpoint
        holds under "class_names", else those of `DATASETS.TEST` if they are as many as the
        detector's classes.

        Raises:
            UserError: the model cannot be built, or the weights are missing, broken, not finite,
                or of another number of classes.
        """
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("no GPU here: running on the CPU")
            cfg.MODEL.DEVICE = "cpu"
        model = build_detector(cfg)
        if not cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS is empty: the detector knows nothing yet")
        loaded = _Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        require_finite(model, cfg.MODEL.WEIGHTS)
        return cls(
            model,
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
            cfg.INPUT.FORMAT,
            _metadata(cfg, loaded.get("class_names")),
        )

    def __call__(self, image: np.ndarray) -> Instances:
        """Detects.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            What the detector found, best first, on the CPU, in pixels of the image.

        Raises:
            UserError: the detector finds no instances (semantic segmentation, proposals).
        """
        with torch.no_grad():
            output = self.model([self._input(image)])[0]
        if "instances" not in output:
            raise UserError(
                f"this detector returns {', '.join(output) or 'nothing'} and no instances; take "
                "the configuration of a detector of boxes"
            )
        return output["instances"].to("cpu")

    def stages(
        self, image: np.ndarray, threshold: float = 0.5, limit: int = MAX_QUERIES
    ) -> list[Instances]:
        """What every decoder stage says of the queries that the last one is sure of.

        Args:
            image: (H, W, 3) uint8, RGB.
            threshold, limit: see `follow_queries`.

        Returns:
            For each stage the instances of `follow_queries`, in pixels of the image.

        Raises:
            UserError: the detector has no such stages.
        """
        require_stages(type(self.model).__name__)
        _, predictions = self.model.predict([self._input(image)])
        return follow_queries(predictions, image.shape[:2], self.model.class_head, threshold, limit)

    def _input(self, image: np.ndarray) -> dict:
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        transform = self.resize.get_transform(image)
        pixels = np.ascontiguousarray(transform.apply_image(image).transpose(2, 0, 1))
        tensor = torch.as_tensor(pixels.astype(np.float32))
        return {"image": tensor, "height": height, "width": width}


def _metadata(cfg: CfgNode, saved_names: list[str] | None) -> Metadata:
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    known = metadata.get("thing_classes")
    names, count = saved_names or known, class_count(cfg)
    if names is not None and count is not None and len(names) != count:
        logger.warning(
            f"the detector has {count} classes and {len(names)} names are known "
            "(DATASETS.TEST): classes are shown by number"
        )
        names = None
    if names is None and count is not None:
        names = [f"class {k}" for k in range(count)]
    return metadata if names == known else Metadata(thing_classes=list(names or []))
