"""Which pictures a command line means: files, folders, patterns, or the images of annotations."""

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
    """Pictures, with what their annotations say of them.

    Args:
        paths: of the pictures.
        image_ids: of each picture in the annotations; None without annotations.
        category_ids: by name, in the annotations; None without annotations.
    """

    paths: list[Path]
    image_ids: list[int | str] | None = None
    category_ids: dict[str, int] | None = None


def list_pictures(inputs: Sequence[str], folder: str | None = None) -> Listing:
    """The pictures that the arguments name.

    Args:
        inputs: what `find_images` takes, or one JSON of annotations in COCO's format.
        folder: of the pictures in such a JSON; by default the JSON's own folder.

    Raises:
        UserError: an argument names nothing, or the JSON is none of COCO's.
    """
    annotations = [name for name in inputs if name.lower().endswith(".json")]
    if not annotations:
        if folder:
            raise UserError("--images goes with a JSON of annotations as --input")
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
        raise UserError(f"{path} is no JSON of COCO's annotations ({reason})") from error
    if not paths:
        raise UserError(f"{path} lists no images")
    if not paths[0].exists() and not folder:
        raise UserError(f"{paths[0]} does not exist: name the folder of the pictures with --images")
    return Listing(paths, [number for _, number in images], categories)


def use_category_ids(detector: Detector, category_ids: dict[str, int]) -> list[str]:
    """Lets a detector give its classes the ids that annotations give their names.

    Args:
        detector: changed in place.
        category_ids: by name.

    Returns:
        The names that both have.

    Raises:
        UserError: there is none.
    """
    shared = [name for name in detector.class_names if name in category_ids]
    if not shared:
        own, others = (", ".join(list(part)[:5]) for part in (detector.class_names, category_ids))
        raise UserError(f"the annotations' classes ({others}) are none of the detector's ({own})")
    detector.category_ids = [category_ids.get(name, 0) for name in detector.class_names]
    return shared
