"""What a detector found in one picture: as numbers, as a drawing, as COCO results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from detectron2.structures import Instances

from ..visualization.draw import draw_detections
from ..visualization.images import write_image
from ..visualization.stages import draw_stages
from ..visualization.window import show
from .pictures import Picture

if TYPE_CHECKING:
    from .detector import Detector

__all__ = ["Detection", "Detections"]


class Detection(NamedTuple):
    """One detected object: its box (left, top, right, bottom in pixels of the picture), score,
    class index and class name."""

    box: tuple[float, float, float, float]
    score: float
    class_id: int
    name: str


class Detections:
    """The objects that a detector found in one picture, best first.

    Everything but `to_coco` leaves out what scores below the threshold.

    Args:
        detector: that found them.
        picture: where.
        found: all of them, of the picture's size, on the CPU.
        threshold: lowest score that counts.
        image: pixels of the picture (H, W, 3) uint8, RGB; read again when None.
    """

    def __init__(
        self,
        detector: Detector,
        picture: Picture,
        found: Instances,
        threshold: float,
        image: np.ndarray | None = None,
    ) -> None:
        self._detector, self._picture = detector, picture
        self._found, self._image = found, image
        self.threshold = threshold

    @property
    def path(self) -> Path | None:
        """The picture's file; None where it has none of its own."""
        return self._picture.path

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture in pixels."""
        return self._found.image_size

    @property
    def image(self) -> np.ndarray:
        """The picture, (H, W, 3) uint8, RGB."""
        return self._picture.read() if self._image is None else self._image

    @cached_property
    def instances(self) -> Instances:
        """Those that count, as Detectron2 knows them (with masks where there are any)."""
        return self._found[self._found.scores >= self.threshold]

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32: left, top, right, bottom in pixels of the picture."""
        return self.instances.pred_boxes.tensor.numpy()

    @property
    def scores(self) -> np.ndarray:
        """(N,) float32, from 0 to 1."""
        return self.instances.scores.numpy()

    @property
    def class_ids(self) -> np.ndarray:
        """(N,) int64: indices into the detector's `class_names`."""
        return self.instances.pred_classes.numpy()

    @property
    def names(self) -> list[str]:
        """The name of each one's class."""
        return [self._detector.class_names[k] for k in self.class_ids]

    @property
    def best_score(self) -> float:
        """The highest score of all, below the threshold too; 0 where there is nothing."""
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
        """The same without the pixels, which are read again when they are asked for."""
        return Detections(self._detector, self._picture, self._found, self.threshold)

    def where(
        self, *, threshold: float | None = None, classes: Sequence[str] | None = None
    ) -> Detections:
        """The same with another threshold, or of some classes alone.

        Args:
            threshold: lowest score that counts; unchanged when None.
            classes: names; all when None.

        Raises:
            UserError: the detector has no such class.
        """
        found = self._found
        if classes is not None:
            wanted = self._detector.class_indices(classes)
            found = found[[k in wanted for k in found.pred_classes.tolist()]]
        threshold = self.threshold if threshold is None else threshold
        return Detections(self._detector, self._picture, found, threshold, self._image)

    @cached_property
    def stages(self) -> list[Detections]:
        """For a system that refines its boxes stage by stage: the same queries at every stage,
        those that the last stage is sure of.

        Raises:
            UserError: the detector has no stages.
        """
        stages = self._detector.follow(self.image, self.threshold)
        return [Detections(self._detector, self._picture, s, 0.0, self._image) for s in stages]

    def draw(self, *, stages: bool = False) -> np.ndarray:
        """The picture with its detections: (H', W', 3) uint8, RGB. Small ones are enlarged.

        Args:
            stages: draw the boxes of every stage side by side instead.
        """
        metadata = self._detector.metadata
        if stages:
            return draw_stages(self.image, [stage.instances for stage in self.stages], metadata)
        return draw_detections(self.image, self.instances, metadata, 0.0)

    def save(self, path: str | os.PathLike[str], *, stages: bool = False) -> Path:
        """Writes the drawing; the suffix says the format, and folders are made.

        Raises:
            UserError: it cannot be written.
        """
        write_image(path, self.draw(stages=stages))
        return Path(path)

    def show(self, *, stages: bool = False) -> None:
        """Shows the drawing: in a notebook's cell, in a window until a key is pressed, or without
        a display as a file whose path is printed."""
        show(self.draw(stages=stages), self._picture.name)

    def to_coco(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """COCO results of all scores, for the COCO tools to score against annotations.

        Args:
            image_id: of the picture in the annotations; by default the number that is its file's
                name, as COCO's are, or else the name.

        Returns:
            Dictionaries with image_id, category_id (as in the annotations that the detector was
            trained on), bbox (left, top, width, height in pixels) and score; beside them category
            (its name) and file_name.
        """
        from detectron2.evaluation.coco_evaluation import instances_to_coco_json

        name = self.path.name if self.path else self._picture.name
        if image_id is None:
            stem = Path(name).stem
            image_id = int(stem) if stem.isdecimal() else name
        results = instances_to_coco_json(self._found, image_id)
        for result in results:
            index = result["category_id"]
            result["category_id"] = self._detector.category_ids[index]
            result["category"] = self._detector.class_names[index]
            result["file_name"] = name
        return results
