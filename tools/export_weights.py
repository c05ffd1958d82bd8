#!/usr/bin/env python
"""Write a model file in half precision, from a model file or from weights and a configuration.

python tools/export_weights.py output/pretrain/model_final.safetensors small.safetensors
python tools/export_weights.py detectron2://.../model_final_280758.pkl faster_rcnn.safetensors \\
    --config-file COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml --threshold 0.6
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.config import set_class_count
from dynamic_detr.data.scenes import register_scenes_of
from dynamic_detr.engine.build import build_detector
from dynamic_detr.engine.model_writer import describe_model, write_model
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import find_config, read_config
from dynamic_detr.files.model_file import (
    SUFFIX,
    ModelInfo,
    describe_config,
    is_model_file,
    read_model,
)


def read_weights(source: str, config_file: str) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Read weights with the parameter names of the configured detector.

    Args:
        source: a model file, or any weights if there is a configuration.
        config_file: configuration of the detector; it replaces that of a model file. Class names
            are those in the weights, else those of `DATASETS.TRAIN`.

    Returns:
        The header of the model file, and the weights by parameter name.

    Raises:
        UserError: the weights cannot be read, or do not match the configuration.
    """
    if is_model_file(source):
        info, weights = read_model(source)
        if config_file:
            cfg = read_config(find_config(config_file), ["MODEL.DEVICE", "cpu"])
            if info.class_names:
                set_class_count(cfg, len(info.class_names))
            _require_fit(weights, build_detector(cfg).state_dict(), f"{source} and {config_file}")
            info = replace(info, config=describe_config(cfg))
        return info, weights
    from dynamic_detr.inference.building import build_with_weights

    cfg = read_config(find_config(config_file), ["MODEL.WEIGHTS", source, "MODEL.DEVICE", "cpu"])
    register_scenes_of(cfg)
    model, rest = build_with_weights(cfg)
    info = describe_model(cfg, {}, max(int(rest.get("iteration", -1)) + 1, 0))
    if names := rest.get("class_names"):
        info = replace(info, class_names=names, category_ids=[])
    return info, model.state_dict()


def _require_fit(weights: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Check that weights have the names and shapes of a model; `what` names both."""
    shapes, others = ({k: tuple(v.shape) for k, v in each.items()} for each in (weights, wanted))
    if misfits := dict(shapes.items() ^ others.items()):
        raise UserError(
            f"{what} are not of one model: {len(misfits)} tensors, such as {min(misfits)}"
        )


def convert(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the floating-point tensors to a dtype.

    Raises:
        UserError: a value exceeds the range of the dtype or is not finite.
    """
    converted = {}
    for name, tensor in weights.items():
        converted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not converted[name].isfinite().all():
            raise UserError(f"{name} does not fit {dtype} or is not finite")
    return converted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a model file, or any weights with --config-file")
    parser.add_argument("target", type=Path, help=f"the file to write, *{SUFFIX}")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--config-file", default="", help="default: the source's configuration")
    parser.add_argument("--threshold", type=float, help="minimum score of a detection")
    parser.add_argument("--note", help="text that the file keeps")
    args = parser.parse_args(argv)
    with report_user_errors("export_weights.py"):
        if args.target.suffix != SUFFIX:
            raise UserError(f"the target {args.target} must end in {SUFFIX}")
        info, weights = read_weights(args.source, args.config_file)
        given = {"threshold": args.threshold, "note": args.note}
        try:
            info = replace(info, **{k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise UserError(f"--{str(error).removeprefix('its ')}") from error
        write_model(args.target, convert(weights, getattr(torch, args.dtype)), info)
        print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB, from {args.source}")


if __name__ == "__main__":
    sys.exit(main())
