"""Pictures with the boxes of every detector, as inline SVG.

Each picture is embedded once and drawn under the boxes of each detector. Wrong boxes are dashed.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.colors import to_hex
from PIL import Image

from dynamic_detr.visualization import read_image
from dynamic_detr.visualization.draw import color

from .errors import classify

__all__ = ["choose", "class_legend", "embedded", "panel", "truth_boxes", "wrong_or_right"]

SHOWN = 6
LONGEST = 400  # longest side of an embedded picture in pixels
QUALITY = 80
_OBJECTS = 3  # least number of objects in a picture, if there are enough such pictures


def choose(truth: dict) -> list[dict]:
    """Return the image records to show: the first ones with several objects."""
    counts: dict[int, int] = {}
    for annotation in truth["annotations"]:
        counts[annotation["image_id"]] = counts.get(annotation["image_id"], 0) + 1
    order = sorted(truth["images"], key=lambda image: counts.get(image["id"], 0) < _OBJECTS)
    return order[:SHOWN]


def embedded(records: Sequence[dict], folder: Path) -> str:
    """Return the SVG definitions of the pictures, which `panel` refers to."""
    definitions = []
    for record in records:
        image = Image.fromarray(read_image(folder / record["file_name"]))
        image.thumbnail((LONGEST, LONGEST))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        data = base64.b64encode(file.getvalue()).decode()
        definitions.append(
            f'<image id="picture-{record["id"]}" width="{record["width"]}" '
            f'height="{record["height"]}" preserveAspectRatio="none" '
            f'href="data:image/jpeg;base64,{data}"/>'
        )
    return f'<svg width="0" height="0" class="hidden"><defs>{"".join(definitions)}</defs></svg>'


def truth_boxes(truth: dict, record: dict) -> list[dict]:
    """Return the annotated boxes of an image record, for `panel`."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    return [
        {**a, "title": names[a["category_id"]], "wrong": False}
        for a in truth["annotations"]
        if a["image_id"] == record["id"]
    ]


def wrong_or_right(truth: dict, results: list[dict], threshold: float) -> list[dict]:
    """Return the detections that score at least a threshold, for `panel`, with kinds of errors."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    kept = [result for result in results if result["score"] >= threshold]
    boxes = []
    for result, kind in zip(kept, classify(truth, kept).kinds, strict=True):
        wrong = kind not in ("correct", "ignored")
        title = f"{names[result['category_id']]} {result['score']:.2f}"
        title += f", wrong: {kind}" if wrong else ""
        boxes.append({**result, "title": title, "wrong": wrong})
    return boxes


def panel(truth: dict, record: dict, boxes: Sequence[dict]) -> str:
    """Return the SVG of one picture with boxes.

    Args:
        truth: annotations in COCO format.
        record: image record of the picture.
        boxes: dicts with "bbox", "category_id", "title" and "wrong".
    """
    colours = _colours(truth)
    shapes = []
    for box in boxes:
        x, y, width, height = (f"{side:.1f}" for side in box["bbox"])
        place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        kind = "box wrong" if box["wrong"] else "box"
        shapes.append(
            f'<rect class="edge" {place}/><rect class="{kind}" {place} '
            f'stroke="{colours[box["category_id"]]}"><title>{escape(box["title"])}</title></rect>'
        )
    return (
        f'<svg class="picture" viewBox="0 0 {record["width"]} {record["height"]}">'
        f'<use href="#picture-{record["id"]}"/>{"".join(shapes)}</svg>'
    )


def class_legend(truth: dict) -> str:
    """Return the legend of class colours as HTML."""
    colours = _colours(truth)
    return " ".join(
        f'<span class="key"><i style="background:{colours[c["id"]]}"></i>{escape(c["name"])}</span>'
        for c in truth["categories"]
    )


def _colours(truth: dict) -> dict[int, str]:
    return {c["id"]: to_hex(color(index)) for index, c in enumerate(truth["categories"])}
