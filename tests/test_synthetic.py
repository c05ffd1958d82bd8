"""Synthetic scenes are reproducible, match their annotations and are not trivial."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from dynamic_detr.data import scenes
from dynamic_detr.data.scenes import register_scenes, register_scenes_of, scenes_name, write_scenes
from dynamic_detr.data.synthetic import (
    FAMILIES,
    SUPERSAMPLE,
    SceneOptions,
    _Canvas,
    draw_scene,
)

SHAPES, SYMBOLS = FAMILIES["shapes"], FAMILIES["symbols"]
SMALL = SceneOptions(sizes=((64, 64),))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scene_depends_on_its_arguments_alone():
    image, objects = draw_scene(SHAPES, "train", 3, seed=1)
    np.random.seed(5)
    again, objects_again = draw_scene(SHAPES, "train", 3, seed=1)
    assert np.array_equal(image, again) and objects == objects_again
    for family, split, index, seed in (
        (SYMBOLS, "train", 3, 1),
        (SHAPES, "val", 3, 1),
        (SHAPES, "train", 4, 1),
        (SHAPES, "train", 3, 2),
    ):
        assert not np.array_equal(image, draw_scene(family, split, index, seed)[0])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_objects_fill_the_promised_range(family):
    sides, labels, counts = [], set(), []
    for index in range(60):
        image, objects = draw_scene(family, "train", index)
        counts.append(len(objects))
        for item in objects:
            x, y, width, height = item["bbox"]
            assert x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height
            assert 0 < item["area"] <= width * height
            sides.append(max(width, height))
            labels.add(item["label"])
    assert min(counts) >= 1 and max(counts) == SceneOptions().max_objects
    assert labels == set(range(len(family.classes)))
    assert min(sides) < 12 and 55 < max(sides) <= 64.5


def test_families_share_no_class():
    assert not set(SHAPES.classes) & set(SYMBOLS.classes)


def _rectangle(width: float, height: float) -> list[np.ndarray]:
    x, y = width / 2, height / 2
    return [np.array([(-x, -y), (x, -y), (x, y), (-x, y)])]


def test_box_and_area_are_those_of_the_visible_part():
    canvas = _Canvas(np.zeros((40, 50, 3), np.float32), min_visible=0.5)
    assert canvas.claim(canvas.rasterise(_rectangle(20, 10), np.array([20, 20])), is_object=True)
    box, area = canvas.measure(1)
    assert np.allclose(box, [10, 15, 20, 10], atol=1 / SUPERSAMPLE)
    assert area == pytest.approx(200, rel=0.05)
    # A second object hides the right quarter of the first and extends 4 pixels beyond it.
    assert canvas.claim(canvas.rasterise(_rectangle(9, 30), np.array([29.5, 20])), is_object=True)
    box, area = canvas.measure(1)
    assert np.allclose(box, [10, 15, 15, 10], atol=1 / SUPERSAMPLE)
    assert area == pytest.approx(150, rel=0.05)
    # Refused: it would hide too much, or too much of the new object is outside the image.
    assert not canvas.claim(canvas.rasterise(_rectangle(9, 30), np.array([19, 20])), is_object=True)
    assert not canvas.claim(canvas.rasterise(_rectangle(9, 9), np.array([50, 40])), is_object=True)
    assert canvas.measure(1) == (box, area)


def test_colour_does_not_tell_objects_from_background():
    colours, inside = [], []
    for index in range(80):
        image, objects = draw_scene(SHAPES, "train", index)
        covered = np.zeros((image.height, image.width), bool)
        for item in objects:
            x, y, width, height = (round(n) for n in item["bbox"])
            # The middle of a box is inside most of the shapes.
            covered[y + height // 4 : y + height * 3 // 4, x + width // 4 : x + width * 3 // 4] = 1
        colours.append(np.asarray(image)[::3, ::3].reshape(-1, 3) / 255)
        inside.append(covered[::3, ::3].reshape(-1))
    rgb, target = np.concatenate(colours), np.concatenate(inside)
    products = [rgb[:, i] * rgb[:, j] for i in range(3) for j in range(i, 3)]
    features = np.column_stack([np.ones(len(rgb)), rgb, *products])
    weights = np.linalg.lstsq(features, target.astype(float), rcond=None)[0]
    ranks = (features @ weights).argsort().argsort()
    positives, negatives = target.sum(), (~target).sum()
    area_under_curve = (ranks[target].mean() - (positives - 1) / 2) / negatives
    assert area_under_curve < 0.65  # 0.5 is chance


def test_too_small_scenes_are_refused():
    with pytest.raises(ValueError, match="16x16 pixels are too small"):
        SceneOptions(sizes=((16, 16),))


def test_files_are_the_same_however_they_are_made(tmp_path):
    assert write_scenes(tmp_path / "a", SYMBOLS, "train", 20, options=SMALL)
    assert write_scenes(tmp_path / "b", SYMBOLS, "train", 20, options=SMALL, processes=2)
    first, second = _content(tmp_path / "a"), _content(tmp_path / "b")
    assert first == second and len(first) == 21


def test_complete_scenes_are_not_made_again(tmp_path):
    def write(seed: int) -> bool:
        return write_scenes(tmp_path, SYMBOLS, "val", 4, seed, SMALL)

    assert write(0)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not write(0)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert write(1) and write(0)
    (tmp_path / "symbols" / "val" / "000002.jpg").unlink()
    assert write(0)


def test_interrupted_scenes_are_made_again(tmp_path, monkeypatch):
    write_scenes(tmp_path, SYMBOLS, "val", 3, options=SMALL)
    first = _content(tmp_path)

    def interrupted(family, split, index, *others):
        if index == 1:
            raise KeyboardInterrupt
        return draw_scene(family, split, index, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "draw_scene", interrupted)
        write_scenes(tmp_path, SYMBOLS, "val", 3, seed=1, options=SMALL)
    assert write_scenes(tmp_path, SYMBOLS, "val", 3, options=SMALL)
    assert _content(tmp_path) == first


def test_annotations_load_with_detectron2(tmp_path):
    write_scenes(tmp_path, SHAPES, "val", 6, options=SceneOptions(sizes=((64, 64), (96, 64))))
    file = tmp_path / "shapes" / "annotations" / "instances_val.json"
    records = load_coco_json(str(file), str(tmp_path / "shapes" / "val"), "test_scenes_loading")
    assert MetadataCatalog.get("test_scenes_loading").thing_classes == SHAPES.classes
    assert {(r["width"], r["height"]) for r in records} == {(64, 64), (96, 64)}
    assert all(os.path.isfile(r["file_name"]) for r in records)
    expected = [draw_scene(SHAPES, "val", i, 0, SceneOptions(((64, 64), (96, 64)))) for i in (0, 5)]
    for (_, objects), record in zip(expected, (records[0], records[5]), strict=True):
        assert [a["bbox"] for a in record["annotations"]] == [o["bbox"] for o in objects]
        assert [a["category_id"] for a in record["annotations"]] == [o["label"] for o in objects]
    areas = [a["area"] for a in json.loads(file.read_text())["annotations"] if a["image_id"] == 5]
    assert areas == [o["area"] for o in expected[1][1]]


def test_importing_the_package_registers_no_scenes():
    code = "import dynamic_detr, detectron2.data as d; print([*d.DatasetCatalog.list()])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "scenes_" not in done.stdout


def test_naming_one_registers_all():
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("scenes_symbols_val",)
    register_scenes_of(cfg)
    register_scenes()  # again
    for family in FAMILIES.values():
        for split in ("train", "val"):
            name = scenes_name(family.name, split)
            assert name in DatasetCatalog.list()
            assert MetadataCatalog.get(name).thing_classes == family.classes
            assert MetadataCatalog.get(name).evaluator_type == "coco"


@pytest.fixture(scope="module")
def make_scenes():
    path = Path(__file__).resolve().parents[1] / "tools" / "make_scenes.py"
    spec = importlib.util.spec_from_file_location("make_scenes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_makes_scenes_once(make_scenes, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--families", "symbols", "--images", "2"]
    arguments += ["--sizes", "64x64", "--processes", "1"]
    make_scenes(arguments)
    assert capsys.readouterr().out.count("made") == 2
    make_scenes(arguments)
    assert capsys.readouterr().out.count("already there") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "'64' is not WIDTHxHEIGHT"),
        (["--images", "0"], "'0' is not an integer >= 1"),
        (["--sizes", "16x16"], "too small for objects"),
        (["--seed", "-1"], "'-1' is not an integer >= 0"),
        (["--families", "letters"], "invalid choice: 'letters'"),
    ],
)
def test_command_explains_wrong_arguments(make_scenes, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        make_scenes(["--output", str(tmp_path), *arguments])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told and "Traceback" not in told
