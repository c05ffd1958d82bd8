#!/usr/bin/env python
"""Convert published weights of other projects.

python tools/convert_weights.py --from detr detr-r50.pth output/detr_R_50.pth
python tools/convert_weights.py --from deformable-detr --config-file \\
    configs/Deformable-DETR/deformable_detr_R_50_two_stage.yaml in.pth out.pth
python tools/convert_weights.py --from torchvision resnet101.pth output/torchvision/R-101.pth

No pickled code of the file is run. The names and shapes must match the model of the configuration.
Class heads with a row for each COCO id are reduced to the 80 classes of Detectron2. A ResNet of
torchvision initialises the backbone only.
"""

import argparse
import pickletools
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import dynamic_detr  # noqa: F401  (first: silences a warning of Detectron2's import)

# isort: split
import torch
from conversions import COCO_ROWS, CONFIGS, SYSTEMS, rename, select_coco_classes
from conversions.huggingface import system_of
from conversions.resnet import resnet_rules
from detectron2.modeling import build_model
from safetensors.torch import load_file
from torch import Tensor

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.config import class_count
from dynamic_detr.errors import UserError, one_line
from dynamic_detr.files.config_file import find_config, read_config
from dynamic_detr.files.reading import check_archive
from dynamic_detr.files.writing import write_atomically

PROJECT = Path(__file__).resolve().parents[1]
MODEL_KEYS = ("model", "state_dict", "model_state_dict")  # of the weights in a checkpoint
LEGACY_PICKLES = 4  # magic number, protocol version, system information and the object
KNOWN_MODULES = ("torch", "collections", "__builtin__")


class Skipped:
    """Stand-in for objects of other classes, such as an `argparse.Namespace` beside the weights."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Skipped":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch or safetensors file by name.

    Objects of other classes than PyTorch's are skipped; no pickled code is run.

    Args:
        path: file with weights by name, either alone or under one of `MODEL_KEYS`.

    Raises:
        UserError: the file cannot be read or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            data = load_file(path)
        else:
            check_archive(path)
            stand_ins = [(Skipped, name) for name in sorted(_foreign_classes(path))]
            with torch.serialization.safe_globals(stand_ins):
                data = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; pass a published file of weights") from error
    except Exception as error:  # torch, pickle and zipfile raise different errors
        raise UserError(f"{path} cannot be read as weights: {one_line(error)}") from error
    if isinstance(data, dict):
        data = next((data[key] for key in MODEL_KEYS if isinstance(data.get(key), dict)), data)
        weights = {
            str(name).removeprefix("module."): value
            for name, value in data.items()
            if isinstance(value, Tensor)
        }
        if weights:
            return weights
    raise UserError(f"{path} contains no dict of tensors, at the top level or under {MODEL_KEYS}")


def _foreign_classes(path: Path) -> set[str]:
    """Return the full names of the pickled classes and functions that PyTorch does not load."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    found = set()
    with path.open("rb") as file:  # the function above does not read the legacy format
        for _ in range(LEGACY_PICKLES):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    module, name = argument.split(" ", 1)
                    if module.partition(".")[0] not in KNOWN_MODULES:
                        found.add(f"{module}.{name}")
    return found


def fit(
    weights: dict[str, Tensor], model: dict[str, Tensor], num_classes: int | None
) -> dict[str, Tensor]:
    """Check that the weights fit a model, and select the rows of its class heads.

    Args:
        weights: weights by the names of the model.
        model: `state_dict` of the model.
        num_classes: K of the model; None if unknown.

    Returns:
        The weights. If K is 80, class heads of 91 (or 92) rows are reduced to 80 (or 81).

    Raises:
        UserError: a weight is missing, left over, or has another shape.
    """
    missing = [name for name in model if name not in weights]
    left_over = [name for name in weights if name not in model]
    if missing or left_over:
        parts = (("missing", missing), ("left over", left_over))
        raise UserError("; ".join(f"{word}: {_few(names)}" for word, names in parts if names))
    fitted = {}
    for name, wanted in model.items():
        found = weights[name]
        by_coco_id = (len(found), len(wanted)) if found.dim() and wanted.dim() else None
        if num_classes == 80 and by_coco_id in ((COCO_ROWS, 80), (COCO_ROWS + 1, 81)):
            found = select_coco_classes(found)
        if found.shape != wanted.shape:
            raise UserError(
                f"{name} is {tuple(weights[name].shape)} in the file, but {tuple(wanted.shape)} "
                "in the model of the configuration"
            )
        fitted[name] = found.clone()  # torch.save saves the whole storage of a view
    return fitted


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def convert_file(system: str, source: Path, target: Path, config_file: str | None = None) -> None:
    """Convert a file of published weights.

    Args:
        system: one of `SYSTEMS`, or "torchvision" for a pretrained ResNet.
        source: published file.
        target: file to write; missing folders are created.
        config_file: config of the model; None for the default in `CONFIGS`.

    Raises:
        UserError: the source cannot be read, or its weights do not fit the model.
    """
    published = read_weights(source)
    if system == "torchvision":
        weights = rename(published, [*resnet_rules("", ""), (r"fc\..*", None)])
        _write({"model": weights, "matching_heuristics": True}, source, target)
        return
    if config_file is None:
        kind = system_of(published) if system == "huggingface" else system
        config_file = str(PROJECT / "configs" / CONFIGS[kind])
    cfg = read_config(find_config(config_file), ["MODEL.DEVICE", "cpu"])
    module = import_module("conversions." + system.replace("-", "_"))
    try:
        weights = fit(module.convert(published), build_model(cfg).state_dict(), class_count(cfg))
    except UserError as error:
        raise UserError(
            f"{source} does not hold the weights of {config_file} (--config-file): {error}"
        ) from error
    _write({"model": weights}, source, target)


def _write(data: dict[str, Any], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: torch.save(data, file))
    size = target.stat().st_size / 1e6
    print(f"{target}: {len(data['model'])} weights, {size:.1f} MB, from {source}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="system", required=True, choices=[*SYSTEMS, "torchvision"])
    parser.add_argument("--config-file", help="config of the model")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    with report_user_errors("convert_weights.py"):
        convert_file(args.system, args.source, args.target, args.config_file)


if __name__ == "__main__":
    sys.exit(main())
