"""Detections of one image, as arrays, as a drawing and as COCO results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from detectron2.structures import Instances

from ..visualization.draw import class_names, draw_detections
from ..visualization.images import write_image
from ..visualization.stages import draw_stages
from ..visualization.window import show
from .pictures import Picture

if TYPE_CHECKING:
    from .detector import Detector

__all__ = ["Detection", "Detections"]


class Detection(NamedTuple):
    """One detected object; its box is (x0, y0, x1, y1) in pixels of the image."""

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    name: str


class Detections:
    """Detections of one image, by descending score.

    All attributes and methods except `best_score` and `to_coco` omit scores below the threshold.

    Args:
        detector: the detector.
        picture: the image.
        found: all instances, in pixels of the image, on the CPU.
        threshold: minimum score of a detection.
        image: pixels (H, W, 3) uint8, RGB; None to read them when needed.
        wanted: indices of the classes of `found`; None for all.
    """

    def __init__(
        self,
        detector: Detector,
        picture: Picture,
        found: Instances,
        threshold: float,
        image: np.ndarray | None = None,
        wanted: set[int] | None = None,
    ) -> None:
        self._detector, self._picture = detector, picture
        self._found, self._image, self._wanted = found, image, wanted
        self.threshold = threshold

    @property
    def path(self) -> Path | None:
        """File of the image; None for arrays and video frames."""
        return self._picture.path

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self._found.image_size

    @property
    def image(self) -> np.ndarray:
        """Pixels, (H, W, 3) uint8, RGB."""
        return self._picture.read() if self._image is None else self._image

    @cached_property
    def instances(self) -> Instances:
        """The detections as Detectron2's `Instances`, with masks if there are any."""
        return self._found[self._found.scores >= self.threshold]

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32: x0, y0, x1, y1 in pixels of the image."""
        return self.instances.pred_boxes.tensor.numpy()

    @property
    def scores(self) -> np.ndarray:
        """(N,) float32 in [0, 1]."""
        return self.instances.scores.numpy()

    @property
    def class_ids(self) -> np.ndarray:
        """(N,) int64: indices into the detector's `class_names`."""
        return self.instances.pred_classes.numpy()

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return class_names(self._detector.metadata, self.class_ids.tolist())

    @property
    def best_score(self) -> float:
        """Highest score, also if it is below the threshold; 0 without instances."""
        return max(self._found.scores.tolist(), default=0.0)

    def __len__(self) -> int:
        return len(self.instances)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.class_ids, self.names)  # noqa: B905
        return (Detection(tuple(box), score, int(k), name) for box, score, k, name in rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in Counter(self.names).items())
        return f"<{self._picture.name}: {counts or 'nothing'} (scores from {self.threshold:.3g})>"

    def without_image(self) -> Detections:
        """Return a copy that does not keep the pixels but reads them when needed."""
        return Detections(
            self._detector, self._picture, self._found, self.threshold, wanted=self._wanted
        )

    def where(
        self, *, threshold: float | None = None, classes: Sequence[str] | None = None
    ) -> Detections:
        """Return a copy with another threshold, or with some of the classes.

        Args:
            threshold: minimum score of a detection; None for no change.
            classes: class names; None for all.

        Raises:
            UserError: a class does not exist.
        """
        found, wanted = self._found, self._wanted
        if classes is not None:
            named = self._detector.class_indices(classes)
            wanted = named if wanted is None else named & wanted
            found = found[[k in wanted for k in found.pred_classes.tolist()]]
        threshold = self.threshold if threshold is None else threshold
        return Detections(self._detector, self._picture, found, threshold, self._image, wanted)

    @cached_property
    def stages(self) -> list[Detections]:
        """The same queries at every decoder stage, selected by their score at the last one.

        Raises:
            UserError: the detector has no decoder stages.
        """
        stages = self._detector.follow(self.image, self.threshold, self._wanted)
        return [Detections(self._detector, self._picture, s, 0.0, self._image) for s in stages]

    def draw(self, *, stages: bool = False) -> np.ndarray:
        """Draw the detections on the image; small images are enlarged.

        Args:
            stages: draw the boxes of every decoder stage side by side.

        Returns:
            (H', W', 3) uint8, RGB.
        """
        metadata = self._detector.metadata
        if stages:
            return draw_stages(self.image, [stage.instances for stage in self.stages], metadata)
        return draw_detections(self.image, self.instances, metadata, 0.0)

    def save(self, path: str | os.PathLike[str], *, stages: bool = False) -> Path:
        """Write the drawing; the suffix selects the format, and folders are created.

        Raises:
            UserError: the file cannot be written.
        """
        write_image(path, self.draw(stages=stages))
        return Path(path)

    def show(self, *, stages: bool = False) -> None:
        """Show the drawing in a notebook cell or a window; without a display, print its path."""
        show(self.draw(stages=stages), self._picture.name)

    def to_coco(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """Return the detections of all scores in COCO's result format.

        Args:
            image_id: id of the image in the annotations; by default the file name without suffix
                as a number, as in COCO, or else the name of the file, frame or array.

        Returns:
            Dictionaries with image_id, category_id (of the training annotations), bbox (x, y,
            width, height in pixels), score, category (class name) and file_name.
        """
        from detectron2.evaluation.coco_evaluation import instances_to_coco_json

        name = self.path.name if self.path else self._picture.name
        if image_id is None:
            stem = self.path.stem if self.path else ""
            image_id = int(stem) if stem.isdecimal() else name
        ids = self._detector.category_ids
        results = instances_to_coco_json(self._found, image_id)
        for result in results:
            index = result["category_id"]
            result["category_id"] = ids[index] if index < len(ids) else index + 1
            result["category"] = class_names(self._detector.metadata, [index])[0]
            result["file_name"] = name
        return results
