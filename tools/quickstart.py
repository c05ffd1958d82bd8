#!/usr/bin/env python
"""Fine-tune the shipped detector on new classes of synthetic scenes, evaluate it, draw pictures.

`make quickstart` runs it. An interrupted run continues where it stopped; after a finished run, only
the evaluation and the pictures are made again.
"""

import argparse
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

import dynamic_detr  # noqa: F401  (first: silences a warning of Detectron2's import)

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.logger import setup_logger
from make_scenes import at_least
from tabulate import tabulate

from dynamic_detr import compat
from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.data.scenes import (
    datasets_root,
    register_scenes,
    scenes_name,
    write_scenes,
)
from dynamic_detr.data.synthetic import FAMILIES
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import read_config
from dynamic_detr.files.model_file import require_model
from dynamic_detr.inference import Detector
from dynamic_detr.runtime.threads import choose_threads
from dynamic_detr.visualization import (
    contact_sheet,
    draw_detections,
    read_image,
    write_image,
)

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "configs" / "quickstart"
METRICS = ("AP", "AP50", "AP75", "APs", "APm")  # scenes are too small for large objects
NOTE = "quickstart.txt"  # in the folder of the fine-tuning: what it started with
SHOWN = 6  # number of scenes of each family in the pictures


def step(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def make_scenes(images: int | None) -> None:
    root = datasets_root() / "scenes"
    for family, split in (("shapes", "val"), ("symbols", "train"), ("symbols", "val")):
        try:
            written = write_scenes(
                root, FAMILIES[family], split, images, processes=os.cpu_count() or 1
            )
        except OSError as error:
            raise UserError(
                f"cannot write scenes to {root} ({error.strerror}); set DETECTRON2_DATASETS to a "
                "writable folder"
            ) from error
        print(f"{root / family}, {split}: {'made' if written else 'already there'}")


def config(file: Path, weights: str, output: Path) -> CfgNode:
    """Read a configuration, or that of a model file, and set weights, device and output folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = read_config(str(file), [])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = device, weights, str(output)
    return cfg


def evaluate(cfg: CfgNode) -> dict[str, float]:
    """Evaluate on the validation scenes; class layers of other shapes stay random."""
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return Trainer.test(cfg, model)["bbox"]


def finetune(weights: str, output: Path, opts: list[str]) -> None:
    """Print and run the command of train_net.py."""
    devices = ["--num-processes", str(min(os.cpu_count() or 1, 2))]
    if torch.cuda.is_available():
        devices = ["--num-gpus", "1"]
    command = [
        *("train_net.py", "--config-file", str(CONFIGS / "finetune.yaml"), *devices, "--resume"),
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(output), *opts),
    ]
    print("python", shlex.join(command), flush=True)
    status = subprocess.run([sys.executable, *command], cwd=PROJECT).returncode
    if status:
        raise UserError(f"fine-tuning stopped with exit code {status}; see its last lines")


def start_of(weights: str, opts: list[str]) -> str:
    """Return what a fine-tuning starts with: a hash of the weights, and the keys."""
    return "\n".join([hashlib.sha256(Path(weights).read_bytes()).hexdigest(), *opts])


def require_same_start(folder: Path, start: str) -> None:
    """Check that a fine-tuning to continue or to evaluate again has the same start.

    Raises:
        UserError: it has another.
    """
    note = folder / NOTE
    if any(folder.glob("model_*")) and not (note.is_file() and note.read_text() == start):
        raise UserError(
            f"{folder} has a fine-tuning with other weights or keys; add --fresh to replace it, or "
            "choose another --output"
        )


def truth(record: dict) -> Instances:
    """Return the annotated objects of a record as detections of score 1."""
    objects = record["annotations"]
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        pred_classes=torch.tensor([o["category_id"] for o in objects], dtype=torch.long),
        scores=torch.ones(len(objects)),
    )


def draw(cfg: CfgNode, folder: Path) -> list[Path]:
    """Draw annotations above detections for some scenes, and the boxes of each stage for one.

    Returns:
        Paths of the two pictures.
    """
    detector = Detector.from_config(cfg)
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    records = sorted(DatasetCatalog.get(name), key=lambda record: len(record["annotations"]) < 3)
    records = records[:SHOWN]  # the first ones with several objects
    images = [read_image(record["file_name"]) for record in records]
    rows = [draw_detections(i, truth(r), metadata) for i, r in zip(images, records, strict=True)]
    found = detector(images)
    rows += [detections.draw() for detections in found]
    numbers = range(1, len(images) + 1)
    titles = [f"{kind} {n}" for kind in ("annotated", "detected") for n in numbers]
    detections = folder / f"{name}.png"
    write_image(detections, contact_sheet(rows, len(images), titles))
    stages = folder / f"{name}_stages.png"
    return [detections, found[0].save(stages, stages=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--weights", default="quickstart", help="a model file or its name")
    parser.add_argument("--scenes", type=at_least(1), help="number of scenes per split")
    parser.add_argument("--fresh", action="store_true", help="fine-tune again from the start")
    parser.add_argument("opts", nargs="*", help="keys for the fine-tuning: SOLVER.MAX_ITER 100 ...")
    args = parser.parse_args(argv)
    compat.ignore_known_warnings()
    setup_logger(name="dynamic_detr").setLevel(logging.WARNING)
    with report_user_errors("quickstart.py"):
        output, weights = args.output.resolve(), os.path.abspath(require_model(args.weights))
        tuned = output / "finetune"
        model = tuned / "model_final.safetensors"
        if args.fresh:
            shutil.rmtree(tuned, ignore_errors=True)
        start = start_of(weights, args.opts)
        require_same_start(tuned, start)

        step("1/5  scenes")
        make_scenes(args.scenes)
        register_scenes()
        if not torch.cuda.is_available():
            print(choose_threads())
        step("2/5  the shipped detector on held-out scenes of its own classes")
        shipped = config(CONFIGS / "pretrain.yaml", weights, output / "shipped")
        table = {"shipped, its own classes": evaluate(shipped)}
        step("3/5  the shipped detector on new classes, with random class layers")
        new = config(CONFIGS / "finetune.yaml", weights, output / "before")
        table["new classes, before fine-tuning"] = evaluate(new)
        step("4/5  fine-tuning on the new classes")
        tuned.mkdir(parents=True, exist_ok=True)
        (tuned / NOTE).write_text(start)
        finetune(weights, tuned, args.opts)
        new = config(model, str(model), output / "after")
        table["new classes, after fine-tuning"] = evaluate(new)
        step("5/5  pictures")
        pictures = draw(shipped, output) + draw(new, output)

    rows = [[name, *(results[m] for m in METRICS)] for name, results in table.items()]
    print("\n" + tabulate(rows, ["box AP on held-out scenes", *METRICS], "pipe", floatfmt=".1f"))
    print("\nPictures:", *pictures, sep="\n  ")
    names = scenes_name("symbols", "val")
    print(f"\nThe new detector, evaluated on {names}, is the file {model}. To use it:\n")
    print("    import dynamic_detr", f'    detector = dynamic_detr.load("{model}")', sep="\n")
    print('    detector("photo.jpg").show()')


if __name__ == "__main__":
    main()
