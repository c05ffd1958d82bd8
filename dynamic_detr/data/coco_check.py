"""Validation and repair of annotations in COCO format before training."""

import codecs
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from ..errors import is_text, one_line
from .coco_report import Report

__all__ = ["check_coco_json"]

SIZE_CHECKS = 2000  # image headers that are read to compare sizes, evenly spread
TOLERANCE = 1.0  # pixels; a box may exceed its image by rounding
LARGEST = 1e9  # largest coordinate or side, pixels
LARGEST_ID = 2**53  # pycocotools stores ids as float64
NO = ("none", "false", "no", "0", "0.0", "")


def check_coco_json(path: str | os.PathLike, image_dir: str | os.PathLike) -> Report:
    """Check one annotation file and repair its content in memory.

    Args:
        path: JSON in COCO's instances format; boxes are (x, y, width, height) in pixels.
        image_dir: folder that each image's ``file_name`` is relative to.

    Returns:
        The problems, counted by kind with a first example, and the repaired content.
    """
    report = Report(Path(path))
    lists = _read(report)
    if lists is None:
        return report
    images, annotations, categories = lists
    category_ids = _check_categories(report, categories)
    sizes = _check_images(report, images, Path(image_dir))
    if report.error():
        return report
    annotations = _check_annotations(report, annotations, sizes, category_ids)
    images = [image for image in images if sizes[image["id"]]]
    usable = [annotation for annotation in annotations if not annotation["iscrowd"]]
    if usable:
        _note_unused(report, images, usable, categories)
    else:
        report.add("no usable boxes", str(path))
    if report.error():
        return report
    image_ids = _integer_ids(report, "image", images)
    category_ids = _integer_ids(report, "category", categories)
    for annotation in annotations:
        annotation["image_id"] = image_ids[annotation["image_id"]]
        annotation["category_id"] = category_ids[annotation["category_id"]]
    report.data.update(images=images, annotations=annotations, categories=categories)
    return report


def _read(report: Report) -> tuple[list, list, list] | None:
    """Return copies of images, annotations and categories; None if an error is reported."""
    try:
        content = report.path.read_bytes()
        data = json.loads(content.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report.add("unreadable file", one_line(error))
        return None
    if content.startswith(codecs.BOM_UTF8):  # pycocotools fails on it
        report.add("byte-order mark", str(report.path))
    if not isinstance(data, dict):
        report.add("unreadable file", f"it contains a {type(data).__name__}, not an object")
        return None
    lists = []
    for key in ("images", "annotations", "categories"):
        records = data.get(key)
        if not isinstance(records, list):
            report.add("missing list", key)
            continue
        for record in records:
            if not isinstance(record, dict):
                report.add("record that is not an object", f"{record!r:.40} in {key}")
        lists.append([dict(record) for record in records if isinstance(record, dict)])
        if not records and key != "annotations":
            report.add(f"no {key}", f"{key} is an empty list")
    if report.error():
        return None
    report.data = {key: data[key] for key in ("info", "licenses") if key in data}
    images, annotations, categories = lists
    return images, annotations, categories


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_number(value) and 1 <= value <= LARGEST and value == int(value)


def _is_whole_id(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and -LARGEST_ID < value < LARGEST_ID


def _check_categories(report: Report, categories: list[dict]) -> set:
    ids, names = set(), set()
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if not _is_id(number) or not isinstance(name, str) or not name:
            report.add("category without id or name", repr(category))
            continue
        if not is_text(name):
            report.add("category name of broken characters", repr(category))
        if number in ids:
            report.add("duplicate category id", f"{number} of {name!r}")
        if name in names:
            report.add("duplicate category name", repr(name))
        ids.add(number)
        names.add(name)
    return ids


def _check_images(report: Report, images: list[dict], image_dir: Path) -> dict[Any, tuple | None]:
    """Return (width, height) of every image by id; None for an image that is left out."""
    sizes: dict[Any, tuple | None] = {}
    files = set()
    every = max(1, math.ceil(len(images) / SIZE_CHECKS))
    for index, image in enumerate(images):
        number, name = image.get("id"), image.get("file_name")
        if not _is_id(number) or not isinstance(name, str) or not name:
            report.add("image without id or file_name", f"{image!r:.120}")
            continue
        if number in sizes:
            report.add("duplicate image id", f"{number} of {name}")
            continue
        if name in files:
            report.add("image listed under several ids", name)
        files.add(name)
        sizes[number] = None
        file = image_dir / name
        if not os.path.isfile(file):  # Path.is_file raises if the name is too long
            report.add("missing image file", str(file))
            continue
        size = tuple(image.get(key) for key in ("width", "height"))
        known = all(_is_size(n) for n in size)
        if not known or index % every == 0:
            try:
                true_size, mode = _header(file)
            except Image.DecompressionBombError:
                report.add("image of too many pixels", str(file))
                continue
            except Exception:  # each format of Pillow raises its own errors
                report.add("file that is not an image", str(file))
                continue
            if mode == "F" or mode.startswith("I"):
                report.add("image of more than 8 bits", f"{name}, {mode} in Pillow's terms")
            if not known:
                report.add("image without width or height", name)
                size = true_size
            elif size != true_size:
                wrong, right = (f"{width:g}x{height:g}" for width, height in (size, true_size))
                report.add("size differs from the file", f"{name}, {wrong} but {right} in the file")
        sizes[number] = image["width"], image["height"] = int(size[0]), int(size[1])
    if not any(sizes.values()) and not report.error():
        unusable = (
            *("missing image file", "file that is not an image"),
            "image of too many pixels",
        )
        example = next(report.examples[kind] for kind in unusable if report.counts[kind])
        report.add("no image file found", example)
    return sizes


def _header(file: Path) -> tuple[tuple[int, int], str]:
    """Return (width, height) after EXIF rotation, and Pillow's mode, without decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata and large sizes
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.size[::-1] if turned else image.size), image.mode


def _check_annotations(
    report: Report, annotations: list[dict], sizes: dict[Any, tuple | None], category_ids: set
) -> list[dict]:
    kept, numbers, renumber = [], set(), False
    for index, annotation in enumerate(annotations):
        where = f"annotation {annotation.get('id', f'number {index + 1}')}"
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not _is_id(image_id) or image_id not in sizes:
            report.add("annotation of an unknown image", f"{where}, image_id {image_id!r}")
            continue
        if sizes[image_id] is None:  # already reported with the image
            continue
        if not _is_id(category_id) or category_id not in category_ids:
            report.add("unknown category", f"{where}, category_id {category_id!r}")
            continue
        box = _check_box(report, annotation.get("bbox"), sizes[image_id], where)
        if box is None:
            continue
        number = annotation.get("id")
        # COCOeval takes the id 0 for no annotation, and so does `best_threshold` a negative one.
        if not _is_whole_id(number) or number < 1 or number in numbers:
            report.add(
                "missing, duplicate or non-positive annotation id", f"{where} of image {image_id}"
            )
            renumber = True
        else:
            numbers.add(number)
        if box is not annotation["bbox"] and _is_number(annotation.get("area")):
            annotation["area"] = min(annotation["area"], box[2] * box[3])
        annotation["bbox"] = box
        _check_rest(report, annotation, sizes[image_id], where)
        kept.append(annotation)
    if renumber:
        for number, annotation in enumerate(kept, start=1):
            annotation["id"] = number
    return kept


def _check_box(
    report: Report, box: Any, image_size: tuple[int, int], where: str
) -> list[float] | None:
    """Return the box (x, y, width, height), clipped to the image; None if it is unusable."""
    where = f"{where}, bbox {box!r:.80}"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(n) for n in box):
        report.add("box that is not 4 numbers", where)
        return None
    if not all(-LARGEST <= n <= LARGEST for n in box):  # also integers too large for a float
        report.add("box with NaN or infinity", where)
        return None
    x, y, width, height = box
    if width <= 0 or height <= 0:
        report.add("box without area", where)
        return None
    where = f"{where} in an image of {image_size[0]}x{image_size[1]}"
    x0, x1 = max(x, 0), min(x + width, image_size[0])
    y0, y1 = max(y, 0), min(y + height, image_size[1])
    if x0 >= x1 or y0 >= y1:
        report.add("box outside the image", where)
        return None
    if max(x0 - x, y0 - y, x + width - x1, y + height - y1) > TOLERANCE:
        report.add("box partly outside the image", where)
        return [x0, y0, x1 - x0, y1 - y0]
    return box


def _check_rest(report: Report, annotation: dict, image_size: tuple[int, int], where: str) -> None:
    """Check and repair all fields except the box, in place."""
    box_area = annotation["bbox"][2] * annotation["bbox"][3]
    area = annotation.get("area")
    if not _is_number(area) or not 0 < area <= LARGEST**2:
        report.add("missing or invalid area", f"{where}, area {area!r}")
        annotation["area"] = box_area
    crowd = annotation.get("iscrowd")
    if crowd not in (0, 1) or isinstance(crowd, bool | float):
        report.add("missing or invalid iscrowd", f"{where}, iscrowd {crowd!r}")
        annotation["iscrowd"] = int(_means_true(crowd))
    if _means_true(annotation.pop("ignore", 0)):
        report.add("ignored box", where)
        annotation["iscrowd"] = 1
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
        if len(polygons) < len(segmentation):
            report.add("invalid segmentation", where)
        annotation["segmentation"] = polygons
    elif segmentation is not None and not _is_mask(segmentation, image_size):
        report.add("invalid segmentation", where)
        del annotation["segmentation"]
    keypoints = annotation.get("keypoints")
    if keypoints is not None and not (_are_numbers(keypoints) and len(keypoints) % 3 == 0):
        report.add("invalid keypoints", where)
        del annotation["keypoints"]


def _means_true(value: Any) -> bool:
    return str(value).lower() not in NO


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        _is_number(value) and -LARGEST <= value <= LARGEST for value in values
    )


def _is_polygon(values: Any) -> bool:
    return _are_numbers(values) and len(values) >= 6 and len(values) % 2 == 0


def _is_mask(segmentation: Any, image_size: tuple[int, int]) -> bool:
    """Return whether a segmentation is an RLE mask of the image's size, compressed or not."""
    if not isinstance(segmentation, dict) or segmentation.get("size") != list(reversed(image_size)):
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and count >= 0 for count in counts)
        return whole and sum(counts) == image_size[0] * image_size[1]
    return isinstance(counts, str) and counts.isascii()


def _note_unused(
    report: Report, images: list[dict], annotations: list[dict], categories: list[dict]
) -> None:
    used_images = {annotation["image_id"] for annotation in annotations}
    used_categories = {annotation["category_id"] for annotation in annotations}
    for image in images:
        if image["id"] not in used_images:
            report.add("image without boxes", image["file_name"])
    for category in categories:
        if category["id"] not in used_categories:
            report.add("category without boxes", repr(category["name"]))


def _integer_ids(report: Report, kind: str, records: list[dict]) -> dict[Any, int]:
    """Map old ids to integers, as pycocotools and Detectron2 need them."""
    ids = [record["id"] for record in records]
    odd = [number for number in ids if not _is_whole_id(number)]
    if not odd:
        return {number: number for number in ids}
    report.add("id that is not an integer", f"{kind} {odd[0]!r}")
    for number, record in enumerate(records, start=1):
        record["id"] = number
    return {old: new for new, old in enumerate(ids, start=1)}
