"""Datasets of synthetic scenes in COCO format, and their registration with Detectron2.

    <root>/scenes/<family>/annotations/instances_{train,val}.json
    <root>/scenes/<family>/{train,val}/000000.jpg ...

The JSON of a split is written last; its ``info.parameters`` determine all files of the split. A
split is complete if its JSON exists with the same parameters.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from tqdm import tqdm

from ..files.writing import write_atomically
from .synthetic import FAMILIES, RECIPE, SceneFamily, SceneOptions, draw_scene

__all__ = [
    "datasets_root",
    "register_scenes",
    "register_scenes_of",
    "scenes_name",
    "write_scenes",
]

JPEG_QUALITY = 92


def datasets_root() -> Path:
    """Return the folder of Detectron2's built-in datasets."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def scenes_name(family: str, split: str) -> str:
    """Return a dataset's name in Detectron2's catalogs, for example ``scenes_shapes_train``."""
    return f"scenes_{family}_{split}"


@dataclass(frozen=True)
class _Split:
    """One split of one family in ``folder``; picklable for multiprocessing."""

    folder: Path
    family: str
    split: str
    images: int
    seed: int
    options: SceneOptions

    @property
    def json_file(self) -> Path:
        return self.folder / "annotations" / f"instances_{self.split}.json"

    @property
    def parameters(self) -> dict:
        return {
            "recipe": RECIPE,
            "family": self.family,
            "split": self.split,
            "images": self.images,
            "seed": self.seed,
            "jpeg_quality": JPEG_QUALITY,
            "options": self.options.to_dict(),
        }

    def is_complete(self) -> bool:
        try:
            data = json.loads(self.json_file.read_text())
            return data["info"]["parameters"] == self.parameters and all(
                (self.folder / self.split / image["file_name"]).is_file()
                for image in data["images"]
            )
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def draw(self, index: int) -> tuple[dict, list[dict]]:
        """Write one image; return its COCO image record and its objects."""
        picture, objects = draw_scene(
            FAMILIES[self.family], self.split, index, self.seed, self.options
        )
        name = f"{index:06d}.jpg"
        picture.save(self.folder / self.split / name, quality=JPEG_QUALITY)
        width, height = picture.size
        return {"id": index, "file_name": name, "width": width, "height": height}, objects


def _to_coco(split: _Split, drawn: Iterable[tuple[dict, list[dict]]]) -> dict:
    images, annotations = [], []
    for image, objects in drawn:
        images.append(image)
        for item in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": item["label"] + 1,
                    "bbox": item["bbox"],
                    "area": item["area"],
                    "iscrowd": 0,
                }
            )
    classes = FAMILIES[split.family].classes
    return {
        "info": {"description": "synthetic scenes", "parameters": split.parameters},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, start=1)],
    }


def write_scenes(
    root: Path,
    family: SceneFamily,
    split: str,
    images: int | None = None,
    seed: int = 0,
    options: SceneOptions | None = None,
    processes: int = 1,
) -> bool:
    """Draw one split, unless it is complete with the same parameters.

    Args:
        root: folder of all families.
        family: the classes of the dataset.
        split: "train" or "val".
        images: number of scenes; None for the family's default.
        seed: seed of the dataset.
        options: appearance of the scenes; None for the defaults.
        processes: number of processes; the files do not depend on it.

    Returns:
        Whether files were written.
    """
    images = family.images[split] if images is None else images
    task = _Split(
        Path(root) / family.name, family.name, split, images, seed, options or SceneOptions()
    )
    if task.is_complete():
        return False
    task.json_file.unlink(missing_ok=True)
    task.json_file.parent.mkdir(parents=True, exist_ok=True)
    (task.folder / split).mkdir(exist_ok=True)
    progress = partial(tqdm, total=images, desc=f"{family.name} {split}", unit="image")
    if processes > 1:
        with multiprocessing.Pool(processes) as pool:
            data = _to_coco(task, progress(pool.imap(task.draw, range(images), chunksize=16)))
    else:
        data = _to_coco(task, progress(map(task.draw, range(images))))
    content = json.dumps(data).encode()
    write_atomically(task.json_file, lambda file: file.write(content))
    return True


def register_scenes() -> None:
    """Register ``scenes_<family>_{train,val}`` with Detectron2, unless they are registered.

    Files are read when a dataset is used.
    """
    scenes = datasets_root() / "scenes"
    for family in FAMILIES.values():
        for split in family.images:
            name = scenes_name(family.name, split)
            if name in DatasetCatalog.list():
                continue
            json_file = scenes / family.name / "annotations" / f"instances_{split}.json"
            image_root = scenes / family.name / split
            DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
            MetadataCatalog.get(name).set(
                json_file=str(json_file),
                image_root=str(image_root),
                evaluator_type="coco",
                thing_classes=family.classes,
            )


def register_scenes_of(cfg: CfgNode) -> None:
    """Call `register_scenes` if ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names a data set of it."""
    if any(name.startswith("scenes_") for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        register_scenes()


def remedy(name: str) -> str:
    """Return how to make a missing data set, as the end of a message; empty for other ones."""
    if not name.startswith("scenes_"):
        return ""
    return f"; make it with: python tools/make_scenes.py --output {datasets_root() / 'scenes'}"


def _load(name: str, json_file: Path, image_root: Path) -> list[dict]:
    if not json_file.is_file():
        raise FileNotFoundError(f"no {json_file}{remedy(name)}")
    return load_coco_json(str(json_file), str(image_root), name)
