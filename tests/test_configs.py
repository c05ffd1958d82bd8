"""Every configuration that the project ships: it merges, builds, and trains for one step.

Also what holds for them together: ablations change one key of their base in one line, schedules
step at 67 % and 89 %, pixel conventions are those of the weights.
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import training_input

from dynamic_detr import add_dynamic_detr_config

CONFIGS = ROOT / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
ABLATIONS = [name for name in NAMES if name.startswith("Ablations/")]
COCO = ["Base-DynamicDETR.yaml", *(name for name in NAMES if name.startswith("COCO-Detection/"))]
RECIPES = [*COCO, *ABLATIONS]
SHORT = {  # one of each system; the others take minutes together
    "COCO-Detection/dynamic_detr_R_50_1x.yaml",
    "DETR/detr_R_50.yaml",
    "Deformable-DETR/deformable_detr_R_50_two_stage.yaml",
    "DyHead/faster_rcnn_R_50_FPN_dyhead.yaml",
    "DyHead/retinanet_R_50_FPN_dyhead.yaml",
    "SMCA/smca_R_50.yaml",
    "Sparse-RCNN/sparse_rcnn_R_50.yaml",
    "quickstart/pretrain.yaml",
}

# The rows of the paper's Tables 1 (own method) and 2, by what they set under MODEL.
ROWS = {
    "table_1": {"SET_DETECTOR.ENCODER": {"IdentityEncoder", "DynamicEncoder"}},
    "table_2": {
        "DYNAMIC_ENCODER.NUM_BLOCKS": {2, 4, 6},
        "DYNAMIC_DECODER.NUM_STAGES": {2, 4, 6},
        "DYNAMIC_DECODER.NUM_HEADS": {2, 4, 8},
        "DYNAMIC_DECODER.FFN_DIM": {512, 1024, 2048},
        "DYNAMIC_DECODER.NUM_QUERIES": {100, 300},
    },
}


@cache
def load(name: str) -> CfgNode:
    """The merged configuration; merging fails on a key that nobody defined."""
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Files that describe the same model share one run of it.
@cache
def one_step(model_node: str) -> tuple[dict[str, float], dict[str, bool]]:
    """Losses of one small image, and whether each trainable parameter has a finite gradient."""
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    model = build_model(cfg)
    classes = [0, cfg.MODEL.SET_DETECTOR.NUM_CLASSES - 1]
    image = training_input(60, 64, [[4, 6, 40, 50], [30, 10, 60, 28]], classes)  # padded: 64 × 64
    with EventStorage():
        losses = model.train()([image])
    sum(losses.values()).backward()
    gradients = {
        name: parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: loss.item() for name, loss in losses.items()}, gradients


@cache
def build_without_memory(model_node: str) -> None:
    cfg = get_cfg()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        build_model(cfg)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHORT])
def test_builds(name: str) -> None:
    build_without_memory(load(name).MODEL.dump())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in NAMES]
)
def test_builds_and_trains_one_step(name: str) -> None:
    cfg = load(name)
    losses, gradients = one_step(cfg.MODEL.dump())
    if cfg.MODEL.META_ARCHITECTURE in ("SetDetector", "DynamicDETR"):
        assert {"loss_class", "loss_l1", "loss_giou"} <= losses.keys()
        if cfg.MODEL.SET_DETECTOR.DECODER == "DynamicDecoder":
            decoder = cfg.MODEL.DYNAMIC_DECODER
            terms = 3 + decoder.CLASSIFY_TRUE_BOXES + 2 * (decoder.NOISED_BOXES > 0)
            assert len(losses) == terms * decoder.NUM_STAGES
    assert all(math.isfinite(loss) for loss in losses.values()), losses
    assert gradients
    assert [parameter for parameter, fine in gradients.items() if not fine] == []


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_is_one_line(name: str) -> None:
    text = (CONFIGS / name).read_text()
    base_line, *rest = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(rest) == 1
    (base,) = yaml.safe_load(base_line).values()
    (changed,) = leaves(yaml.safe_load(rest[0]))
    key, value = changed
    base_cfg = load(str((CONFIGS / name).parent.joinpath(base).resolve().relative_to(CONFIGS)))
    before, after = dict(leaves(base_cfg)), dict(leaves(load(name)))
    different = [key for key in after if after[key] != before[key]]
    # a row that the paper prints in bold is the default: it pins the value that it had
    assert different == ([key] if value != before[key] else [])
    assert after[key] == value


@pytest.mark.parametrize("table", ROWS)
def test_ablations_are_the_rows_of_the_paper(table: str) -> None:
    found: dict[str, list] = {}
    for path in (CONFIGS / "Ablations" / table).glob("*.yaml"):
        own = yaml.safe_load(path.read_text())
        ((key, value),) = leaves(own["MODEL"])
        found.setdefault(key, []).append(value)
    assert {key: sorted(values) for key, values in found.items()} == {
        key: sorted(values) for key, values in ROWS[table].items()
    }


@pytest.mark.parametrize("name", RECIPES)
def test_schedule(name: str) -> None:
    solver = load(name).SOLVER
    assert [round(step / solver.MAX_ITER, 2) for step in solver.STEPS] == [0.67, 0.89]
    assert (270_000 if "_3x" in name else 90_000) == solver.MAX_ITER
    sizes = load(name).INPUT.MIN_SIZE_TRAIN
    assert tuple(sizes) == (tuple(range(480, 801, 32)) if "_3x" in name else (800,))
    assert load(name).INPUT.MAX_SIZE_TRAIN == 1333


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith(("DETR/", "Deformable-DETR/", "SMCA/"))]
)
def test_schedule_in_epochs(name: str) -> None:
    """DETR trains for 500 epochs, its relatives for 50, and others for those in their names."""
    solver = load(name).SOLVER
    if "_1x" in name or "dynamic_encoder" in name:
        assert (solver.MAX_ITER, solver.STEPS) == (90_000, (60_000, 80_000))
        return
    named = re.search(r"_(\d+)ep", name)
    default = 500 if name.startswith("DETR/") and "plus" not in name else 50
    epochs = int(named[1]) if named else default
    step = 86 if epochs == 108 else epochs * 4 // 5
    iterations = 118_287 // solver.IMS_PER_BATCH  # per epoch; the last batch is dropped
    assert (epochs * iterations, (step * iterations,)) == (solver.MAX_ITER, solver.STEPS)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("quickstart/")])
def test_pixels_are_those_of_the_weights(name: str) -> None:
    cfg = load(name)
    weights = cfg.MODEL.WEIGHTS
    torchvision = "/torchvision/" in weights
    assert ("RGB" if torchvision else "BGR") == cfg.INPUT.FORMAT
    order = 1 if torchvision else -1
    assert [123.675, 116.28, 103.53][::order] == cfg.MODEL.PIXEL_MEAN
    # Detectron1's catalogue and MSRA's models hold the standard deviation in their first layer.
    folded = weights.startswith("catalog://") or "/MSRA/" in weights
    std = [1.0, 1.0, 1.0] if folded else [58.395, 57.12, 57.375][::order]
    assert std == cfg.MODEL.PIXEL_STD
    assert ("/MSRA/" in weights) == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"
    if weights.startswith("catalog://"):
        assert ModelCatalog.get(weights.removeprefix("catalog://")).endswith(".pkl")


def test_recipe_is_complete() -> None:
    """The kinds of files that the README's tables name are all there."""
    assert {Path(name).parts[0] for name in NAMES} >= {"Ablations", "COCO-Detection", "quickstart"}
    assert {Path(name).stem.removeprefix("dynamic_detr_") for name in COCO} == {
        "Base-DynamicDETR",
        "R_50_1x",
        "R_50_3x",
        "residual_R_50_1x",
        "R_101_3x",
        "X_101_32x8d_3x",
        "X_101_64x4d_DCN_3x",
    }


def test_the_list_of_configurations_is_complete() -> None:
    links = re.findall(r"\]\(([^)]+\.yaml)\)", (CONFIGS / "README.md").read_text())
    assert set(links) == set(NAMES)
