"""The losses of three training steps of the shipped detector on a stored batch, as once recorded.

A change that is meant to change nothing leaves them equal. One that is meant to change them records
them anew, and its commit message says why: `python -m tests.test_golden_losses`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from dynamic_detr.files.config_file import read_config
from dynamic_detr.files.model_file import read_model

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "tests" / "golden" / "scenes.npz"  # image_i, boxes_i, classes_i of scene i
LOSSES = ROOT / "tests" / "golden" / "losses.json"  # for each step, each loss
STEPS = 3
TOLERANCES = (1e-4, 1e-3, 1e-3)  # one thread: 2e-5, 1e-4, 2e-4


def stored_batch() -> list[dict]:
    """The scenes, of several sizes, as Detectron2's mapper gives them."""
    stored = np.load(SCENES)
    batch = []
    for index in range(len(stored.files) // 3):
        image = torch.from_numpy(stored[f"image_{index}"])  # (H, W, 3) RGB
        instances = Instances(tuple(image.shape[:2]))
        instances.gt_boxes = Boxes(torch.from_numpy(stored[f"boxes_{index}"]))  # corners, pixels
        instances.gt_classes = torch.from_numpy(stored[f"classes_{index}"])
        batch.append({"image": image.permute(2, 0, 1).contiguous(), "instances": instances})
    return batch


def train() -> list[dict[str, float]]:
    """Each loss of each step, with plain SGD from the shipped weights."""
    cfg = read_config(str(ROOT / "configs" / "quickstart" / "pretrain.yaml"), [])
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    missing = model.load_state_dict(read_model("quickstart")[1])
    assert not missing.missing_keys and not missing.unexpected_keys
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch, steps = stored_batch(), []
    torch.manual_seed(0)  # of the noised boxes
    for _ in range(STEPS):
        losses = model.train()(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        steps.append({name: float(loss.detach()) for name, loss in losses.items()})
    return steps


def test_golden_losses():
    recorded = json.loads(LOSSES.read_text())
    for step, (losses, golden, tolerance) in enumerate(
        zip(train(), recorded, TOLERANCES, strict=True)
    ):
        assert losses == pytest.approx(golden, rel=tolerance), f"step {step}"


if __name__ == "__main__":
    LOSSES.write_text(json.dumps(train(), indent=1) + "\n")
