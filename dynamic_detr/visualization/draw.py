"""Detections drawn on their image with Detectron2's `Visualizer`.

Colours are the same in every run: one per class, or one per query to compare stages.
"""

import colorsys
import contextlib
import math
from collections.abc import Iterator

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from ..errors import UserError, one_line

__all__ = [
    "class_names",
    "color",
    "draw_boxes",
    "draw_detections",
    "labels",
    "literal_labels",
    "new_canvas",
    "rescaled",
    "resized",
]

# Longer side in pixels. Images up to SMALL are enlarged by the smallest integer factor that reaches
# LEGIBLE, or labels would cover the objects. Larger drawings than LARGEST fail to open elsewhere.
SMALL, LEGIBLE, LARGEST = 256, 512, 8192
_MARGIN = 1  # pixels around a label
_STEPS = 12  # largest vertical shift of a label, in label heights


def new_canvas(image: np.ndarray, metadata=None):
    """Return Detectron2's `Visualizer` of an image (H, W, 3) uint8, RGB.

    Raises:
        UserError: matplotlib or OpenCV is not installed.
    """
    try:
        from detectron2.utils.visualizer import Visualizer
    except ImportError as error:
        raise UserError(
            f"drawing needs matplotlib and OpenCV ({one_line(error)}): "
            "pip install matplotlib opencv-python-headless"
        ) from error
    return Visualizer(image, metadata)


@contextlib.contextmanager
def literal_labels() -> Iterator[None]:
    """Draw class names as they are; matplotlib would read "$...$" as a formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def color(index: int) -> tuple[float, float, float]:
    """Return a bright colour (red, green, blue in [0, 1]), distinct for neighbouring indices.

    Detectron2's `colormap` also has dark and grey colours, which are hard to see on photographs.
    """
    hue = (0.58 + index * 0.618034) % 1  # steps of the golden ratio keep successive hues apart
    return colorsys.hsv_to_rgb(hue, (0.85, 0.55)[index // 8 % 2], 1.0)


def class_names(metadata, classes: list[int]) -> list[str]:
    """Return the names of class indices from Detectron2's metadata, "class 3" if unnamed."""
    names = getattr(metadata, "thing_classes", None) or []
    return [names[k] if k < len(names) else f"class {k}" for k in classes]


def labels(instances: Instances, metadata) -> list[str]:
    """Return a label for each instance, such as "cat 93%"."""
    names = class_names(metadata, instances.pred_classes.tolist())
    return [
        f"{name} {score:.0%}" for name, score in zip(names, instances.scores.tolist(), strict=True)
    ]


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    """Return the image scaled by a factor, at least one pixel a side."""
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def rescaled(instances: Instances, size: tuple[int, int]) -> Instances:
    """Return the instances with boxes scaled to an image of size (height, width).

    Unlike Detectron2's `detector_postprocess`, empty boxes are kept, so the order is unchanged.
    """
    boxes = instances.pred_boxes.clone()
    boxes.scale(size[1] / instances.image_size[1], size[0] / instances.image_size[0])
    return Instances(size, **{**instances.get_fields(), "pred_boxes": boxes})


def _factor(image: np.ndarray, instances: Instances) -> float:
    longest = max(image.shape[:2])
    if instances.has("pred_masks") or instances.has("pred_keypoints"):
        return 1
    if longest <= SMALL:
        return math.ceil(LEGIBLE / longest)
    return min(1, LARGEST / longest)


def draw_boxes(
    image: np.ndarray,
    instances: Instances,
    colors: list[tuple[float, float, float]],
    texts: list[str] | None,
    metadata=None,
) -> np.ndarray:
    """Draw each instance in its colour and with its label, if any; see `draw_detections`.

    Lines get a dark edge to stand out from any background. Labels are moved into the image and
    apart from each other.
    """
    canvas = new_canvas(image, metadata)
    with literal_labels():
        canvas.overlay_instances(
            boxes=instances.pred_boxes,
            labels=texts,
            masks=list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
            keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
            assigned_colors=colors,
        )
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    for patch in canvas.output.ax.patches:
        if isinstance(patch, Rectangle):
            edge = withStroke(linewidth=patch.get_linewidth() + 1.5, foreground="black", alpha=0.5)
            patch.set(alpha=1, path_effects=[edge])
    _arrange(canvas.output.ax.texts, canvas.output.canvas.get_renderer(), image.shape[:2])
    return canvas.output.get_image()


def _arrange(texts, renderer, size: tuple[int, int]) -> None:
    """Move labels into the image, and up or down so that they do not overlap.

    The first label belongs to the best detection and stays closest to its box. If all positions
    within `_STEPS` overlap, the one with the smallest overlap is used.
    """
    height, width = size
    taken = np.zeros((0, 4))  # left, top, right, bottom
    for text in texts:
        extent = text.get_window_extent(renderer)  # from the lower left corner
        shift_x = -max(0, min(extent.x1 - width, extent.x0))
        shift_y = min(0, extent.y0)
        left, top = extent.x0 + shift_x, height - extent.y1 + shift_y
        own = np.array([left, top, left + extent.width, top + extent.height])
        step = extent.height + 2 * _MARGIN
        shifts = np.array(sorted(range(-_STEPS, _STEPS + 1), key=abs)) * step
        inside = (own[1] + shifts >= 0) & (own[3] + shifts <= height)
        shifts = shifts[inside] if inside.any() else np.zeros(1)
        places = own + np.outer(shifts, [0, 1, 0, 1])
        low = np.maximum(places[:, None, :2], taken[:, :2])
        high = np.minimum(places[:, None, 2:], taken[:, 2:])
        covered = np.prod(np.clip(high - low, 0, None), axis=2).sum(axis=1)
        best = int(covered.argmin())  # the first minimum is the smallest shift
        x, y = text.get_position()
        text.set_position((x + shift_x, y + shift_y + shifts[best]))
        taken = np.vstack([taken, places[best] + [-_MARGIN, -_MARGIN, _MARGIN, _MARGIN]])


def draw_detections(
    image: np.ndarray, instances: Instances, metadata=None, threshold: float = 0.5
) -> np.ndarray:
    """Draw boxes, class names and scores, and masks and keypoints if present.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: with pred_boxes (x0, y0, x1, y1 in pixels of the image), scores and
            pred_classes.
        metadata: Detectron2's, for class names.
        threshold: minimum score to draw.

    Returns:
        (H', W', 3) uint8, RGB; small images are enlarged, very large ones are scaled down.
    """
    instances = instances[instances.scores >= threshold].to("cpu")
    factor = _factor(image, instances)
    if factor != 1:
        image = resized(image, factor)
        instances = rescaled(instances, image.shape[:2])
    colors = [color(k) for k in instances.pred_classes.tolist()]
    return draw_boxes(image, instances, colors, labels(instances, metadata), metadata)
