"""Training on a user's own boxes: the R-50 configuration of COCO, made small by options, on
photographs of blood cells with a pretrained ResNet-18."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "MODEL.SET_DETECTOR.HIDDEN_DIM", "64"),
    *("MODEL.DYNAMIC_DECODER.NUM_QUERIES", "60", "MODEL.DYNAMIC_ENCODER.NUM_BLOCKS", "1"),
    *("MODEL.DYNAMIC_DECODER.NUM_STAGES", "2", "MODEL.DYNAMIC_DECODER.DYNAMIC_DIM", "16"),
    *("MODEL.DYNAMIC_DECODER.FFN_DIM", "128"),
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(120,)",
        "INPUT.MIN_SIZE_TEST",
        "120",
        "DATALOADER.NUM_WORKERS",
        "0",
    ),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0005", "SOLVER.WARMUP_ITERS", "5"),
    *("SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "0", "SEED", "1"),
]


def train_net(bccd: Path, val_json: Path, *options: str) -> str:
    """Run the command; return its output."""
    places = [
        *("--train-json", bccd / "annotations" / "instances_train.json"),
        *("--train-images", bccd / "train", "--val-json", val_json, "--val-images", bccd / "val"),
    ]
    config = "configs/COCO-Detection/dynamic_detr_R_50_1x.yaml"
    done = subprocess.run(
        [sys.executable, "train_net.py", "--config-file", config, *map(str, places), *options],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "2", **os.environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_blood_cells_train_resume_and_evaluate(bccd, r18_weights, tmp_path):
    val = json.loads((bccd / "annotations" / "instances_val.json").read_text())
    val["images"] = val["images"][:6]
    kept = {image["id"] for image in val["images"]}
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(val))
    options = [*SMALL, "MODEL.WEIGHTS", str(r18_weights), "OUTPUT_DIR", str(tmp_path / "output")]

    train_net(bccd, tmp_path / "val.json", *options, "SOLVER.MAX_ITER", "40")
    resumed = train_net(bccd, tmp_path / "val.json", "--resume", *options, "SOLVER.MAX_ITER", "80")
    assert "Starting training from iteration 40" in resumed
    assert "AP50" in resumed

    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    metrics = {line["iteration"]: line for line in map(json.loads, lines) if "total_loss" in line}
    assert metrics[79]["total_loss"] < 0.9 * metrics[19]["total_loss"]
