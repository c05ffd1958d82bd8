#!/usr/bin/env python
"""Measure the speed of operators and detectors, and of their baselines and lower bounds.

python tools/benchmark.py                            # on the GPU if there is one, else on the CPU
python tools/benchmark.py --dtype bfloat16 --size 800x1344
python tools/benchmark.py models --no-naive          # without the baseline operators
python tools/benchmark.py models --config-file A.yaml --config-file B.yaml
python tools/benchmark.py transformers               # DETR, Deformable DETR and Hugging Face's
python tools/benchmark.py peers                      # operators of deformops and other packages

Operators are compared with operators of torchvision, Detectron2, PyTorch and SciPy (the baseline),
and detectors with the same model on these operators and with Detectron2's detectors. The lower
bound of a detector is the time of its backbone, and of plain convolutions and matrix products of
the sizes of its other products. Tables are printed in Markdown. Times are medians ± half the
interquartile range of calls in turns; ratios are more reliable than times. A call that exceeds
the budget is measured once, without warm-up. On a CPU, a model with the baseline operators is timed
for one image only.
"""

import argparse
import json
import os
import platform
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import dynamic_detr  # noqa: F401  (first: silences a warning of Detectron2's import)

# isort: split
import detectron2
import torch
import torchvision
from benchmarks.hugging_face import measure_hugging_face
from benchmarks.models import measure_models, profile_model
from benchmarks.operators import measure_operators
from benchmarks.peers import measure_peers
from make_scenes import at_least
from tabulate import tabulate

from dynamic_detr import compat
from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import find_config
from dynamic_detr.runtime.threads import choose_threads

PROJECT = Path(__file__).resolve().parents[1]
OURS = PROJECT / "configs" / "COCO-Detection" / "dynamic_detr_R_50_1x.yaml"
PEERS = ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml")

MEASURED = ("operators", "models", "profile", "transformers", "peers")
VERSIONS = ("torch", "torchvision", "detectron2", "Python")
SMALLEST = 64  # pixels: one cell of the coarsest level


def size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 800x1216")
    if min(int(height), int(width)) < SMALLEST:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; use {SMALLEST} pixels or more")
    return int(height), int(width)


def machine(device: str) -> dict[str, str]:
    """Return the machine's name, with the threads on a CPU, its load, and versions of packages."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "machine": name if device == "cuda" else f"{name}, {choose_threads()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "Python": platform.python_version(),
    }


def with_spread(value: float, spread: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {100 * spread:.0f} %"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def with_dtype(row: dict, key: str) -> str:
    """Return the name of the row's "bound" or "baseline", with its dtypes if they are known."""
    dtypes = row["ran_in"].get(key)
    return f"{row[key]} ({dtypes})" if dtypes else row[key] or ""


def operator_table(rows: list[dict]) -> str:
    table = [
        [
            row["operator"],
            with_spread(row["milliseconds"], row["spread"], 2),
            with_dtype(row, "bound"),
            f"{100 * row['share_of_bound']:.0f} %",
            ratio(row["times_bound"]),
            with_dtype(row, "baseline"),
            ratio(row["speedup"]),
        ]
        for row in rows
    ]
    headers = ["operator", "ms", "bound", "share", "× its time", "baseline", "speed-up"]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def model_table(rows: list[dict], args: argparse.Namespace) -> str:
    table = [
        [
            row["model"],
            with_spread(row["latency_s"], row["latency_spread"], 3),
            ratio(row["latency_to_first"]),
            ratio(row["latency_to_bound"]),
            ratio(row["latency_to_peer"]),
            ratio(row["images_per_s"]),
            ratio(row["train_step_s"]),
            ratio(row["train_step_to_first"]),
            ratio(row["train_step_to_bound"]),
            ratio(row["train_step_to_peer"]),
            ratio(row["train_peak_gb"]),
            row["ran_in"],
            f"{row['parameters_m']:.1f}" if row["parameters_m"] else "",
            ", ".join(f"{part} {count:.0f}" for part, count in (row["gmac"] or {}).items()),
        ]
        for row in rows
    ]
    ratios = ["× first", "× bound", f"× {Path(args.peer[0]).stem}"]
    headers = ["model", "one image, s", *ratios, f"images/s, batch {args.batch}"]
    headers += [f"training step, {args.train_batch} images, s", *ratios]
    headers += ["its peak, GB", "ran in", "parameters, M", "GMAC"]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def transformers_table(rows: list[dict]) -> str:
    table = [
        [
            f"{row['system']}, {row['part']}",
            f"{row['ours_s']:.3f}",
            f"{row['theirs_s']:.3f}",
            ratio(row["ours_s"] / row["theirs_s"]),
        ]
        for row in rows
    ]
    headers = ["one image", "ours, s", "Hugging Face's, s", "ours / theirs"]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def peers_table(rows: list[dict]) -> str:
    table = [
        [row["name"], row["package"], row["error"], *[""] * 4]
        if "error" in row
        else [
            row["name"],
            row["package"],
            with_spread(row["milliseconds"], row["spread"], 2),
            ratio(row["ours_to_theirs"]),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "" if row["difference"] is None else f"{row['difference']:.0e}",
            row["ran_in"],
        ]
        for row in rows
    ]
    headers = ["operator", "package", "ms", "ours / theirs", "peak, MB", "difference", "ran in"]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def profile_table(name: str, rows: list[dict]) -> str:
    table = [[row["operation"], f"{100 * row['share']:.1f} %", row["calls"]] for row in rows]
    return tabulate(table, [name, "share", "calls"], "pipe", disable_numparse=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["all", *MEASURED], default="all")
    parser.add_argument(
        "--config-file",
        action="append",
        help="configuration of a detector; repeatable, the first one is the reference of ratios "
        f"(default: {OURS.stem})",
    )
    parser.add_argument(
        "--peer",
        action="append",
        help="configuration to compare with; repeatable (default: Detectron2's Faster R-CNN, "
        "RetinaNet)",
    )
    parser.add_argument("--size", type=size, default=(800, 1216), metavar="HEIGHTxWIDTH")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    count = at_least(1)
    parser.add_argument("--batch", type=count, default=8, help="images per batch of throughput")
    parser.add_argument("--train-batch", type=count, default=2, help="images per training step")
    parser.add_argument("--repeats", type=count, default=7, help="measured calls of each function")
    parser.add_argument("--budget", type=float, default=60, help="seconds for each function")
    parser.add_argument("--no-naive", action="store_true", help="skip the baseline operators")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    args.config_file = args.config_file or [str(OURS)]
    args.peer = args.peer or list(PEERS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"size": args.size, "dtype": args.dtype, **machine(device)}
    compat.ignore_known_warnings()
    torch.manual_seed(0)
    with report_user_errors("benchmark.py"):
        if args.dtype == "float16" and device == "cpu":
            raise UserError("--dtype float16 requires a GPU; use bfloat16 on the CPU")
        if args.json and not args.json.parent.is_dir():
            raise UserError(f"--json: the folder {args.json.parent} does not exist")
        names = Counter(Path(config).stem for config in (*args.config_file, *args.peer))
        if twice := [name for name, times in names.items() if times > 1]:
            raise UserError(f"two configurations have the name {twice[0]}; rename one")
        for config in (*args.config_file, *args.peer):
            find_config(config)
        versions = ", ".join(f"{key} {result[key]}" for key in VERSIONS)

        def show(part: str) -> None:
            print(f"\n{part}", flush=True)

        print(
            f"{result['machine']}; load average before: {result['load']}; {versions}; "
            f"{args.size[0]} × {args.size[1]}, {args.dtype}"
        )
        if args.what in ("all", "operators"):
            result["operators"] = measure_operators(args, device)
            show(operator_table(result["operators"]))
        if args.what in ("all", "models"):
            result["models"] = measure_models(args, device)
            show(model_table(result["models"], args))
        if args.what in ("all", "profile"):
            result["profile"] = profile_model(args, device)
            for name, rows in result["profile"].items():
                show(profile_table(name, rows))
        if args.what == "transformers":  # not part of "all": it requires another package
            result["transformers"] = measure_hugging_face(args, device)
            show(transformers_table(result["transformers"]))
        if args.what == "peers":
            result["peers"] = measure_peers(args, device)
            show(peers_table(result["peers"]))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
