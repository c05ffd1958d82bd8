#!/usr/bin/env python
"""Makes a small file to ship from a training checkpoint: weights alone, in half precision.

python tools/export_weights.py output/pretrain/model_final.pth weights/quickstart.pth
"""

import argparse
import sys
from pathlib import Path

import torch

from dynamic_detr.engine.checkpoint import write_atomically
from dynamic_detr.engine.exits import report_user_errors
from dynamic_detr.engine.reading import check_archive
from dynamic_detr.errors import UserError, one_line

KEPT = ("class_names",)  # beside the weights, where the checkpoint has them


def export(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies the "model" of a checkpoint, which is the moving average where there is one.

    Args:
        source: a checkpoint of `train_net.py`.
        target: the file to write; folders are made.
        dtype: of the floating-point tensors in it.

    Raises:
        UserError: the source is no checkpoint, or a weight does not fit the dtype.
    """
    try:
        check_archive(source)
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        weights = checkpoint["model"]
    except Exception as error:  # torch, pickle and zip each have their own errors
        raise UserError(f"{source} is not a checkpoint with a model: {one_line(error)}") from error
    small = {}
    for name, tensor in weights.items():
        small[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not small[name].isfinite().all():
            raise UserError(f"{name} in {source} does not fit {dtype} or is not finite")
    data = {"model": small, **{key: checkpoint[key] for key in KEPT if key in checkpoint}}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: torch.save(data, file))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, from {source}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args(argv)
    with report_user_errors("export_weights.py"):
        export(args.source, args.target, getattr(torch, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
