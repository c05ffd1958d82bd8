#!/usr/bin/env python
"""How long one image takes: Dynamic DETR, the same model put together from the usual operators, and
Detectron2's Faster R-CNN, in one run.

python tools/benchmark.py                    # R-50, 800 x 1216 pixels, on the GPU if there is one

Weights are random: they change no shape. The naive composition is this project's detector with
torchvision's deformable convolution and Detectron2's RoI pooler in place of its own operators.
Times are medians; what to quote are the ratios to Faster R-CNN.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from dynamic_detr import Pyramid, compat
from dynamic_detr.engine.exits import report_user_errors
from dynamic_detr.engine.setup import find_config, read_config

PROJECT = Path(__file__).resolve().parents[1]
OURS = PROJECT / "configs" / "COCO-Detection" / "dynamic_detr_R_50_1x.yaml"
PEER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def naive_deform_conv2d(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias=None, *geometry, **kw
) -> Tensor:
    return torchvision.ops.deform_conv2d(
        input.contiguous(), offset, weight, bias, *geometry, mask=mask, **kw
    )


def naive_roi_align(
    pyramid: Pyramid, boxes: Tensor, output_size: int, sampling_ratio: int, canonical_size: float
) -> Tensor:
    scales = [1 / stride for stride in pyramid.strides]
    pooler = ROIPooler(output_size, scales, sampling_ratio, "ROIAlignV2", int(canonical_size))
    regions = pooler(list(pyramid.features), [Boxes(b) for b in boxes.detach()])
    return regions.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])


@contextmanager
def usual_operators() -> Iterator[None]:
    """Within it the detector runs on torchvision's and Detectron2's operators."""
    encoder = "dynamic_detr.encoders.dynamic_block.deform_conv2d"
    decoder = "dynamic_detr.decoders.dynamic_stage.pyramid_roi_align"
    with mock.patch(encoder, naive_deform_conv2d), mock.patch(decoder, naive_roi_align):
        yield


def config(name: str, device: str) -> CfgNode:
    cfg = read_config(find_config(name), [])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device
    return cfg


def seconds(function: Callable[[], object], device: str, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def part_times(model: nn.Module, device: str, parts: dict[str, list[float]]) -> Iterator[None]:
    """Adds up what each part of the detector takes."""
    handles = []
    for name in ("backbone", "encoder", "decoder"):
        started = []

        def before(*_, started=started):
            if device == "cuda":
                torch.cuda.synchronize()
            started.append(time.perf_counter())

        def after(*_, started=started, name=name):
            if device == "cuda":
                torch.cuda.synchronize()
            parts.setdefault(name, []).append(time.perf_counter() - started.pop())

        module = getattr(model, name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def measure(args: argparse.Namespace) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *args.size), dtype=torch.float32)
    inputs = [{"image": image, "height": args.size[0], "width": args.size[1]}]
    peer = build_model(config(args.peer, device)).eval()
    ours = build_model(config(str(args.config_file), device)).eval()
    dtype = getattr(torch, args.dtype)

    def runner(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return model(inputs)

        return run

    parts: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {"Faster R-CNN": [], "Dynamic DETR": [], "naive": []}
    # each round times all of them, so that what else the machine does falls on all alike
    for number in tqdm(range(args.repeats + 1), desc="rounds"):
        if number == 1:  # the first one warms up
            times = {name: [] for name in times}
            parts.clear()
        times["Faster R-CNN"] += seconds(runner(peer), device, 1)
        with part_times(ours, device, parts):
            times["Dynamic DETR"] += seconds(runner(ours), device, 1)
        if not args.no_naive:
            with usual_operators():
                times["naive"] += seconds(runner(ours), device, 1)
    unit = statistics.median(times["Faster R-CNN"])
    rows = [
        {"what": name, "seconds": values, "median": statistics.median(values)}
        for name, values in {**times, **{f"  its {k}": v for k, v in parts.items()}}.items()
        if values
    ]
    return [{**row, "ratio": row["median"] / unit} for row in rows]


def size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 800x1216")
    return int(height), int(width)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=OURS, help="of Dynamic DETR")
    parser.add_argument("--peer", default=PEER, help="configuration that ratios are taken to")
    parser.add_argument("--size", type=size, default=(800, 1216), metavar="HEIGHTxWIDTH")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-naive", action="store_true", help="leave the naive composition out")
    parser.add_argument("--json", type=Path, help="also write the times to this file")
    args = parser.parse_args(argv)
    compat.ignore_known_warnings()
    with report_user_errors("benchmark.py"):
        rows = measure(args)
    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{machine}, torch {torch.__version__}, Python {platform.python_version()}, ", end="")
    print(f"{args.size[0]} x {args.size[1]}, {args.dtype}, median of {args.repeats}\n")
    table = [
        [r["what"], r["median"], min(r["seconds"]), max(r["seconds"]), r["ratio"]] for r in rows
    ]
    headers = ["one image", "seconds", "min", "max", "x Faster R-CNN"]
    print(tabulate(table, headers, "pipe", floatfmt=("", ".3f", ".3f", ".3f", ".2f")))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
