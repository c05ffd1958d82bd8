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

    Lines get a dark edge, as no colour stands out from every picture, and texts are moved inside.
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
    renderer = canvas.output.canvas.get_renderer()
    for text in canvas.output.ax.texts:
        extent = text.get_window_extent(renderer)  # from the lower left corner
        x, y = text.get_position()
        x -= max(0, min(extent.x1 - image.shape[1], extent.x0))
        text.set_position((x, y + min(0, extent.y0)))
    return canvas.output.get_image()


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
