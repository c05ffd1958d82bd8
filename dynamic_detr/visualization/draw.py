"""Detections drawn on their picture, by Detectron2's `Visualizer`.

Colours are the same in every run: one per class, or one per query where stages are compared.
"""

import colorsys
import math

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from ..errors import UserError, one_line

__all__ = [
    "class_names",
    "color",
    "confident",
    "draw_boxes",
    "draw_detections",
    "labels",
    "new_canvas",
    "rescaled",
    "resized",
]

# Sides of a drawing in pixels. A picture of at most SMALL is enlarged by a whole factor to LEGIBLE
# or a little more, so that letters next to its objects do not cover them; the upper limit is what
# other programs open without trouble.
SMALL, LEGIBLE, LARGEST = 256, 512, 8192
_MARGIN = 1  # pixels around a text
_STEPS = 12  # of its height that a text may be moved up or down


def new_canvas(image: np.ndarray, metadata=None):
    """Detectron2's `Visualizer` of a picture (H, W, 3) uint8, RGB.

    Raises:
        UserError: its packages are not installed.
    """
    try:
        from detectron2.utils.visualizer import Visualizer
    except ImportError as error:
        raise UserError(
            f"drawing needs matplotlib and OpenCV ({one_line(error)}): "
            "pip install matplotlib opencv-python-headless"
        ) from error
    return Visualizer(image, metadata)


def color(index: int) -> tuple[float, float, float]:
    """A bright colour (red, green, blue in 0 to 1), far from those of neighbouring indices."""
    hue = (0.58 + index * 0.618034) % 1  # the golden ratio never returns near a recent hue
    return colorsys.hsv_to_rgb(hue, (0.85, 0.55)[index // 8 % 2], 1.0)


def class_names(metadata, classes: list[int]) -> list[str]:
    """Names of class indices by Detectron2's metadata; "class 3" where it has none."""
    names = getattr(metadata, "thing_classes", None) or []
    return [names[k] if k < len(names) else f"class {k}" for k in classes]


def labels(instances: Instances, metadata) -> list[str]:
    """Class and score of each, such as "cat 93%"."""
    names = class_names(metadata, instances.pred_classes.tolist())
    return [
        f"{name} {score:.0%}" for name, score in zip(names, instances.scores.tolist(), strict=True)
    ]


def confident(instances: Instances, threshold: float) -> Instances:
    """Those of at least this score, on the CPU."""
    instances = instances.to("cpu")
    return instances[instances.scores >= threshold]


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    """A picture enlarged or shrunk, to at least one pixel."""
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def rescaled(instances: Instances, size: tuple[int, int]) -> Instances:
    """Boxes for the picture at another (height, width); other fields stay as they are."""
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
    """Draws each instance in its colour, with its text; masks and keypoints where it has them.

    Lines get a dark edge, as no colour stands out from every picture; texts are moved inside and
    off one another.
    """
    canvas = new_canvas(image, metadata)
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
    """Moves texts into the picture, and up or down where they would cover one another.

    The first text is that of the best detection and stays nearest to its box. Where there is no
    room within `_STEPS` of its height, a text goes where it covers the least.
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
        best = int(covered.argmin())  # of equals the first, which is the nearest
        x, y = text.get_position()
        text.set_position((x + shift_x, y + shift_y + shifts[best]))
        taken = np.vstack([taken, places[best] + [-_MARGIN, -_MARGIN, _MARGIN, _MARGIN]])


def draw_detections(
    image: np.ndarray, instances: Instances, metadata=None, threshold: float = 0.5
) -> np.ndarray:
    """Draws boxes, class names and scores; masks and keypoints where there are any.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: of the picture's size, with pred_boxes (corners in pixels), scores and
            pred_classes.
        metadata: Detectron2's, for class names; "class 3" without.
        threshold: lowest score that is drawn.

    Returns:
        (H', W', 3) uint8, RGB: of the picture's size, or for small pictures a multiple of it.
    """
    instances = confident(instances, threshold)
    factor = _factor(image, instances)
    if factor != 1:
        image = resized(image, factor)
        instances = rescaled(instances, image.shape[:2])
    colors = [color(k) for k in instances.pred_classes.tolist()]
    return draw_boxes(image, instances, colors, labels(instances, metadata), metadata)
