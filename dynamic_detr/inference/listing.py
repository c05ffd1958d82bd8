"""Images named on a command line: files, folders, patterns, or the images of annotations."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, one_line
from ..visualization.files import find_images
from .detector import Detector

__all__ = ["Listing", "list_pictures", "use_category_ids"]


@dataclass(frozen=True)
class Listing:
    """Image files, with ids if they come from annotations.

    Args:
        paths: the files.
        image_ids: id of each image; None without annotations.
        category_ids: category ids by name; None without annotations.
    """

    paths: list[Path]
    image_ids: list[int | str] | None = None
    category_ids: dict[str, int] | None = None


def list_pictures(inputs: Sequence[str], folder: str | None = None) -> Listing:
    """Return the images that the arguments name.

    Args:
        inputs: arguments of `find_images`, or one JSON file of annotations in COCO format.
        folder: folder of the images of a JSON file; by default the folder of the file.

    Raises:
        UserError: an argument matches no file, or the JSON file is not in COCO format.
    """
    annotations = [name for name in inputs if name.lower().endswith(".json")]
    if not annotations:
        if folder:
            raise UserError("--images needs a JSON file of annotations as --input")
        return Listing(find_images(inputs))
    if len(inputs) > 1:
        raise UserError(f"the annotations {annotations[0]} must be the only --input")
    return _read(Path(os.path.expanduser(annotations[0])), folder)


def _read(path: Path, folder: str | None) -> Listing:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        images = [(image["file_name"], image["id"]) for image in data["images"]]
        categories = {c["name"]: c["id"] for c in data.get("categories", [])}
        paths = [Path(folder or path.parent) / name for name, _ in images]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)[:100]
        raise UserError(f"{path} is not a JSON file of COCO annotations ({reason})") from error
    if not paths:
        raise UserError(f"{path} lists no images")
    if not paths[0].exists() and not folder:
        raise UserError(f"{paths[0]} does not exist: set the folder of the images with --images")
    return Listing(paths, [number for _, number in images], categories)


def use_category_ids(detector: Detector, category_ids: dict[str, int]) -> list[str]:
    """Set the category ids of a detector to those of annotations, by name.

    Args:
        detector: changed in place.
        category_ids: category ids of the annotations by name.

    Returns:
        The class names that both have.

    Raises:
        UserError: there are none.
    """
    shared = [name for name in detector.class_names if name in category_ids]
    if not shared:
        own, others = (", ".join(list(part)[:5]) for part in (detector.class_names, category_ids))
        raise UserError(
            f"the annotations ({others}) and the detector ({own}) have no class in common"
        )
    detector.category_ids = [category_ids.get(name, 0) for name in detector.class_names]
    return shared
