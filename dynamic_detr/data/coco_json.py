"""Training on the annotations in COCO format that the command line names.

``--train-json A.json --train-images DIR --val-json B.json --val-images DIR`` registers the data
sets ``own_train`` and ``own_val`` with Detectron2 and sets the number of classes. If a file needs
repairs, a repaired copy is written to ``OUTPUT_DIR/annotations``, for training and evaluation. Its
name has a hash of its content: another command in the same folder does not overwrite it.
"""

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..config import detection_limits, set_class_count
from ..errors import UserError, one_line, tell
from ..files.writing import write_atomically
from .coco_check import check_coco_json
from .coco_report import Report

__all__ = ["apply_json_datasets", "check_coco_json", "register_json"]


def register_json(
    name: str, json_file: str | os.PathLike, image_dir: str | os.PathLike, classes: list[str]
) -> None:
    """Register annotations in COCO format with Detectron2; replaces a data set of the same name.

    Args:
        name: name in Detectron2's catalogs.
        json_file: annotations without errors (see ``check_coco_json``).
        image_dir: folder that each image's ``file_name`` is relative to.
        classes: category names by ascending id.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {"thing_classes": classes}, str(json_file), str(image_dir))


def apply_json_datasets(
    cfg: CfgNode, args: Any, weights_names: list[str] | None = None
) -> list[Report]:
    """Configure training and evaluation on the data sets that the command line names.

    Sets ``DATASETS.TRAIN`` and ``TEST`` and the number of classes. Unless ``args.opts`` has these
    keys, keeps images without boxes as background (``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` False)
    and turns off the scaling of the schedule (``SOLVER.REFERENCE_WORLD_SIZE`` 0). Process 0 prints
    the reports.

    Args:
        cfg: changed in place; not frozen.
        args: with ``train_json``, ``train_images``, ``val_json``, ``val_images`` (paths or None),
            ``eval_only`` and ``opts``. ``val_json`` is optional; ``train_json`` is with
            ``eval_only``.
        weights_names: with ``eval_only``, the class names of the weights; categories are paired
            with them by name. By default they are paired with those of ``train_json`` or, without
            it, by the order of their ids.

    Returns:
        The report of each file.

    Raises:
        UserError: flags are missing, a file has errors, or the categories differ.
    """
    reports = {}
    for split in ("train", "val"):
        json_file, image_dir = (getattr(args, f"{split}_{flag}") for flag in ("json", "images"))
        if not json_file and not image_dir:
            continue
        if not json_file or not image_dir:
            raise UserError(f"--{split}-json and --{split}-images go together: give both")
        if not os.path.isdir(image_dir):
            raise UserError(f"--{split}-images {image_dir} is not a folder")
        reports[split] = check_coco_json(json_file, image_dir)
    if "train" not in reports and not getattr(args, "eval_only", False):
        raise UserError("--val-json alone can only be evaluated: give --train-json or --eval-only")
    if errors := [report.error() for report in reports.values() if report.error()]:
        raise UserError("; ".join(errors))
    _print(*reports.values())

    changed = {split: report.repaired for split, report in reports.items()}
    if getattr(args, "eval_only", False) and weights_names and "val" in reports:
        changed["val"] |= _pair_with_weights(weights_names, reports["val"])
    elif len(reports) == 2:
        changed["val"] |= _share_categories(reports["train"], reports["val"])
    elif getattr(args, "eval_only", False) and "val" in reports:
        _print(
            f"the weights contain no class names: the categories of {reports['val'].path} are "
            "assumed to be the detector's classes, in the order of their ids"
        )
    for split, report in reports.items():
        name = f"own_{split}"
        json_file = report.path
        if changed[split]:
            json_file = _write(report.data, Path(cfg.OUTPUT_DIR) / "annotations", name)
            _print(f"repaired copy: {json_file}")
        register_json(name, json_file, getattr(args, f"{split}_images"), _names(report))
        _check_masks_and_keypoints(cfg, report)
        _tell_of_crowded_images(cfg, report)
    cfg.DATASETS.TRAIN = ("own_train",) if "train" in reports else ()
    cfg.DATASETS.TEST = ("own_val",) if "val" in reports else ()
    set_class_count(cfg, len(_names(list(reports.values())[-1])))
    chosen = getattr(args, "opts", None) or []
    if "DATALOADER.FILTER_EMPTY_ANNOTATIONS" not in chosen:
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    if "SOLVER.REFERENCE_WORLD_SIZE" not in chosen:
        cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    return list(reports.values())


def _is_first_process() -> bool:
    """Return whether this is process 0, before the process group exists."""
    return multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"


def _print(*lines: object) -> None:
    if _is_first_process():
        tell("\n".join(map(str, lines)))


def _names(report: Report) -> list[str]:
    """Return the class names by ascending category id, which is Detectron2's order."""
    return [c["name"] for c in sorted(report.data["categories"], key=lambda c: c["id"])]


def _share_categories(train: Report, val: Report) -> bool:
    """Give ``val`` the category ids of ``train`` by name; return whether ``val`` changed."""
    ids = {category["name"]: category["id"] for category in train.data["categories"]}
    names = {category["id"]: category["name"] for category in val.data["categories"]}
    only_train = sorted(set(ids) - set(names.values()))
    only_val = sorted(set(names.values()) - set(ids))
    if only_train or only_val:
        differences = [
            f"{_some(only)} only in {path}"
            for only, path in ((only_train, train.path), (only_val, val.path))
            if only
        ]
        raise UserError(
            f"the categories of training and validation differ: {'; '.join(differences)}; "
            "list the same names in both"
        )
    if all(ids[name] == number for number, name in names.items()):
        return False
    for annotation in val.data["annotations"]:
        annotation["category_id"] = ids[names[annotation["category_id"]]]
    val.data["categories"] = train.data["categories"]
    return True


def _pair_with_weights(names: list[str], val: Report) -> bool:
    """Give ``val`` the classes of the weights as categories; return whether ``val`` changed.

    Raises:
        UserError: a category name is not a class of the weights.
    """
    own = _names(val)
    if own == names:
        return False
    classes = {name: index for index, name in enumerate(names, start=1)}
    if unknown := [name for name in own if name not in classes]:
        raise UserError(
            f"{val.path} has categories that are not classes of the weights: {_some(unknown)}; the "
            f"classes are {_some(names)}. Give both the same names"
        )
    if len(classes) < len(names):
        raise UserError("two classes of the weights have the same name and cannot be paired")
    by_id = {category["id"]: category["name"] for category in val.data["categories"]}
    for annotation in val.data["annotations"]:
        annotation["category_id"] = classes[by_id[annotation["category_id"]]]
    val.data["categories"] = [{"id": index, "name": name} for name, index in classes.items()]
    if moved := [name for index, name in enumerate(own) if names[index : index + 1] != [name]]:
        _print(
            f"categories of {val.path} and classes of the weights are paired by name, not by "
            f"position: {_some(moved)}"
        )
    if absent := [name for name in names if name not in own]:
        _print(f"{len(absent)} classes of the weights are not in {val.path}: {_some(absent)}")
    return True


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(map(repr, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def _check_masks_and_keypoints(cfg: CfgNode, report: Report) -> None:
    if cfg.MODEL.KEYPOINT_ON:
        raise UserError(
            "MODEL.KEYPOINT_ON is set, but --train-json and --val-json take only boxes and "
            "segmentations; register a data set with keypoint_names for that"
        )
    if cfg.MODEL.MASK_ON:
        bare = [a["id"] for a in report.data["annotations"] if not a.get("segmentation")]
        if bare:
            raise UserError(
                f"MODEL.MASK_ON is set, but {len(bare)} annotations of {report.path} have no "
                f"segmentation (first: id {bare[0]}); set MODEL.MASK_ON False to train on boxes"
            )


def _tell_of_crowded_images(cfg: CfgNode, report: Report) -> None:
    limits = detection_limits(cfg)
    most = min(limits.values())
    boxes = Counter(a["image_id"] for a in report.data["annotations"] if not a["iscrowd"])
    if crowded := [count for count in boxes.values() if count > most]:
        keys = sorted(key for key, limit in limits.items() if limit < max(crowded))
        _print(
            f"{report.path}: {len(crowded)} of {len(report.data['images'])} images have more boxes "
            f"than the {most} that are detected in an image, up to {max(crowded)}; increase "
            f"{' and '.join(keys)}"
        )


def _write(data: dict, folder: Path, name: str) -> Path:
    """Write JSON to ``NAME-<hash>.json``; return the path.

    All processes of a run may write the same file at the same time.
    """
    content = json.dumps(data).encode()
    path = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content), shared=True)
    except OSError as error:
        raise UserError(
            f"the repaired annotations cannot be written ({one_line(error)}); set OUTPUT_DIR to a "
            "folder that can"
        ) from error
    return path
