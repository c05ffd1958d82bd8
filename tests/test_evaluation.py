"""Evaluation pairs classes by name, and finds the threshold with the best F1."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

from dynamic_detr.cli.arguments import build_parser, load_config
from dynamic_detr.cli.train_net import evaluate
from dynamic_detr.data.synthetic import FAMILIES
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.evaluation import EvaluationInterrupted, Interruptible
from dynamic_detr.engine.stopping import stop_request
from dynamic_detr.engine.threshold import best_threshold
from dynamic_detr.errors import UserError
from dynamic_detr.files.model_file import read_model

PRETRAIN = str(ROOT / "configs" / "quickstart" / "pretrain.yaml")
SHIPPED = "quickstart"


def changed_json(scenes: Path, folder: Path, change) -> Path:
    data = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    change(data)
    path = folder / "changed.json"
    path.write_text(json.dumps(data))
    return path


def reverse_categories(data: dict) -> None:
    """The same names and boxes; the category ids run the other way."""
    number = len(data["categories"]) + 1
    for category in data["categories"]:
        category["id"] = number - category["id"]
    for annotation in data["annotations"]:
        annotation["category_id"] = number - annotation["category_id"]


def configured(json_file: Path, images: Path, output: Path, *options: str) -> CfgNode:
    args = build_parser().parse_args(
        [
            *("--config-file", PRETRAIN, "--eval-only", "--num-gpus", "0"),
            *("--val-json", str(json_file), "--val-images", str(images)),
            *("OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", "0", "MODEL.WEIGHTS", SHIPPED),
            *options,
        ]
    )
    return load_config(args)


def evaluated(json_file: Path, images: Path, output: Path) -> dict[str, float]:
    return evaluate(configured(json_file, images, output), resume=False)["bbox"]


@pytest.fixture(scope="module")
def wanted(scenes, tmp_path_factory) -> dict[str, float]:
    """The numbers of the untouched file."""
    original = scenes / "annotations" / "instances_val.json"
    return evaluated(original, scenes / "val", tmp_path_factory.mktemp("wanted"))


def test_classes_are_paired_by_name(scenes, wanted, tmp_path, capsys):
    reverse = changed_json(scenes, tmp_path, reverse_categories)
    found = evaluated(reverse, scenes / "val", tmp_path / "b")
    assert "are paired by name, not by position: " in capsys.readouterr().out
    assert wanted["AP"] > 50 and found["AP"] == pytest.approx(wanted["AP"])


def test_a_part_of_the_classes_is_evaluated(scenes, tmp_path, capsys):
    def keep_one(data: dict) -> None:
        kept = data["categories"][-1]
        data["annotations"] = [a for a in data["annotations"] if a["category_id"] == kept["id"]]
        kept["id"] = 1
        for annotation in data["annotations"]:
            annotation["category_id"] = 1
        data["categories"] = [kept]

    part = changed_json(scenes, tmp_path, keep_one)
    found = evaluated(part, scenes / "val", tmp_path / "out")
    assert "5 classes of the weights are not in" in capsys.readouterr().out
    names = MetadataCatalog.get("own_val").thing_classes
    assert found["AP"] == pytest.approx(found[f"AP-{names[-1]}"])


def test_categories_without_a_partner_are_refused(scenes, tmp_path):
    def rename(data: dict) -> None:
        data["categories"][0]["name"] = "unicorn"

    renamed = changed_json(scenes, tmp_path, rename)
    with pytest.raises(UserError, match="are not classes of the weights: 'unicorn'"):
        evaluated(renamed, scenes / "val", tmp_path / "out")


def test_weights_without_names_are_told(scenes, tmp_path, capsys):
    nameless = tmp_path / "nameless.pth"
    torch.save({"model": read_model(SHIPPED)[1]}, nameless)
    original = scenes / "annotations" / "instances_val.json"
    configured(original, scenes / "val", tmp_path / "out", "MODEL.WEIGHTS", str(nameless))
    assert "the weights contain no class names" in capsys.readouterr().out


def test_registered_data_of_other_classes_are_refused(tmp_path):
    info, weights = read_model(SHIPPED)
    names = info.class_names[::-1]
    torch.save({"model": weights, "class_names": names}, tmp_path / "reversed.pth")
    args = build_parser().parse_args(
        ["--config-file", PRETRAIN, "--eval-only", "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS"]
        + [str(tmp_path / "reversed.pth")]
    )
    with pytest.raises(UserError, match="in the data set scenes_shapes_val and .*--val-json"):
        load_config(args)


def coco(boxes: list[tuple], scores: list[float] | None = None) -> COCO | list[dict]:
    """Boxes (image, class, x, side), as annotations or, with scores, as results."""
    entries = [
        {"id": n, "image_id": i, "category_id": k, "bbox": [x, 0, s, s], "area": s * s}
        for n, (i, k, x, s) in enumerate(boxes, start=1)
    ]
    if scores is not None:
        return [{**entry, "score": score} for entry, score in zip(entries, scores, strict=True)]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 100, "height": 20}, {"id": 2, "width": 100, "height": 20}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [{**entry, "iscrowd": 0} for entry in entries],
    }
    truth.createIndex()
    return truth


def test_the_threshold_has_the_best_f1():
    truth = coco([(1, 1, 0, 10), (1, 2, 20, 10), (2, 1, 40, 10), (2, 2, 60, 10)])
    found = [(1, 1, 0, 10), (1, 2, 21, 10), (2, 1, 80, 10), (2, 1, 40, 10), (1, 1, 70, 10)]
    scores = [0.4, 0.3, 0.25, 0.2, 0.1]  # right, right, wrong, right, wrong
    results = truth.loadRes(coco(found, scores))
    threshold, f1 = best_threshold(truth, results)
    # By hand: 3 right of 4 kept, of 4 objects: 2·3 / (4 + 4); 2 of 2 gives 2·2 / (2 + 4).
    assert threshold == pytest.approx(0.15) and f1 == pytest.approx(75)


def test_no_hit_has_no_threshold():
    truth = coco([(1, 1, 0, 10)])
    assert np.isnan(best_threshold(truth, truth.loadRes(coco([(1, 1, 50, 10)], [0.9])))).all()


def test_evaluation_reports_the_threshold(wanted):
    assert 0.1 < wanted["threshold"] < 0.9 and wanted["AP50"] * 0.8 < wanted["F1"] <= 100


def test_the_names_in_a_checkpoint_are_read_alone():
    assert SafeCheckpointer(torch.nn.Module()).read(SHIPPED)["class_names"] == list(
        FAMILIES["shapes"].classes
    )


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_signal_that_also_ends_a_data_worker_is_told_as_a_signal(monkeypatch, number):
    class Images:
        def __iter__(self):
            yield [{}]
            monkeypatch.setattr(stop_request, "signal", number)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    images = iter(Interruptible(Images()))
    next(images)
    with pytest.raises(EvaluationInterrupted if number else RuntimeError):
        next(images)
