"""Annotations in COCO format: all problems are found, and repaired or reported in one line."""

import argparse
import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.data.coco_json import apply_json_datasets, check_coco_json
from dynamic_detr.data.coco_report import KINDS, Severity
from dynamic_detr.engine.evaluation import BoxEvaluator
from dynamic_detr.errors import UserError

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "b.png", "width": 30, "height": 40},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [5, 5, 20, 9], "area": 99, "iscrowd": 1},
        {"id": 3, "image_id": 9, "category_id": 5, "bbox": [0, 0, 30, 40], "area": 9, "iscrowd": 0},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "b.png")
    Image.new("I;16", (40, 30)).save(tmp_path / "deep.png")
    Image.new("1", (1, 1)).save(tmp_path / "large.png")
    large = bytearray((tmp_path / "large.png").read_bytes())
    large[16:24] = (20_000).to_bytes(4, "big") * 2  # width and height in the header
    large[29:33] = zlib.crc32(large[12:29]).to_bytes(4, "big")
    (tmp_path / "large.png").write_bytes(large)
    return tmp_path


def _write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def _check(folder: Path, data: object):
    return check_coco_json(_write(folder / "labels.json", data), folder)


def _changed(change: Callable[[dict], object]) -> dict:
    data = copy.deepcopy(GOOD)
    change(data)
    return data


def _set(where: str, index: int, **values) -> dict:
    return _changed(lambda data: data[where][index].update(values))


def _each(where: str, key: str, *values: object) -> list[dict]:
    """Return one file for each value of a key of the first record; MISSING removes the key."""
    return [
        _without(where, 0, key) if value is MISSING else _set(where, 0, **{key: value})
        for value in values
    ]


def _without(where: str, index: int, key: str) -> dict:
    return _changed(lambda data: data[where][index].pop(key))


def _renumbered(where: str, key: str, ids: dict[int, object]) -> dict:
    """Return a file with other ids of images or categories; `key` is their name in annotations."""
    data = copy.deepcopy(GOOD)
    for records, name in ((data[where], "id"), (data["annotations"], key)):
        for record in records:
            record[name] = ids.get(record[name], record[name])
    return data


def test_good_file_is_left_alone(folder):
    report = _check(folder, GOOD)
    assert not report.counts and not report.repaired and not report.error()
    assert report.data == GOOD


NAN, INFINITY, MISSING = float("nan"), float("inf"), object()
HUGE, HALF = 10**400, "\ud800"  # no float, and one half of a character
WOLF = _set("categories", 0, name="wolf")


CASES = {
    "unreadable file": ["{", "[1, 2]", "3"],
    "byte-order mark": ["\ufeff" + json.dumps(GOOD)],
    "missing list": [
        _changed(lambda d: d.pop("categories")),
        _changed(lambda d: d.update(annotations={})),
    ],
    "no images": [_changed(lambda d: d.update(images=[]))],
    "no categories": [_changed(lambda d: d.update(categories=[]))],
    "record that is not an object": [_changed(lambda d: d["images"].append("c.png"))],
    "category without id or name": [
        _without("categories", 0, "name"),
        _without("categories", 1, "id"),
        _set("categories", 0, name=4),
    ],
    "duplicate category id": [_set("categories", 0, id=3)],
    "duplicate category name": [_set("categories", 0, name="cat")],
    "category name of broken characters": [_set("categories", 0, name=f"do{HALF}g")],
    "category without boxes": [
        _changed(lambda d: d["categories"].append({"id": 6, "name": "x"})),
        _set("annotations", 0, iscrowd=1, image_id=9, bbox=[0, 0, 9, 9]),
    ],
    "image without id or file_name": [_without("images", 0, "id"), _set("images", 1, file_name="")],
    "duplicate image id": [_set("images", 0, id=9)],
    "no image file found": [
        _changed(lambda d: [i.update(file_name=f"no/{i['file_name']}") for i in d["images"]])
    ],
    "size differs from the file": [_set("images", 0, width=30, height=40)],
    "image of more than 8 bits": [_set("images", 0, file_name="deep.png")],
    "missing image file": _each("images", "file_name", "no.png", "a" * 5000, HALF, "a\0.png"),
    "image of too many pixels": [_set("images", 0, file_name="large.png")],
    "file that is not an image": [_set("images", 0, file_name="labels.json")],
    "image without width or height": [
        _without("images", 0, "width"),
        *_each("images", "height", 0, HUGE, INFINITY, NAN, -HUGE, "30"),
    ],
    "image listed under several ids": [
        _changed(lambda d: d["images"].append({**d["images"][0], "id": 8}))
    ],
    "image without boxes": [_changed(lambda d: d["annotations"].pop())],
    "no usable boxes": [
        _changed(lambda d: d["annotations"].clear()),
        _changed(lambda d: [a.update(iscrowd=1) for a in d["annotations"]]),
    ],
    "annotation of an unknown image": _each("annotations", "image_id", 8, [7]),
    "unknown category": _each("annotations", "category_id", MISSING, 4),
    "box that is not 4 numbers": _each(
        "annotations", "bbox", MISSING, None, [1, 2, 3], ["1", 2, 3, 4]
    ),
    "box with NaN or infinity": _each("annotations", "bbox", [NAN, 2, 3, 4], [1, 2, INFINITY, 4]),
    "box without area": _each("annotations", "bbox", [1, 2, 0, 4], [1, 2, 5, -4]),
    "box outside the image": _each("annotations", "bbox", [40, 2, 5, 5], [2, -9, 5, 5]),
    "box partly outside the image": _each("annotations", "bbox", [35, 2, 15, 8], [-2, 2, 9, 8]),
    "missing, duplicate or non-positive annotation id": [
        _set("annotations", 1, id=1),
        *_each("annotations", "id", 0, -3),
        _without("annotations", 0, "id"),
    ],
    "id that is not an integer": [
        *(_renumbered("categories", "category_id", {5: n}) for n in (HUGE, INFINITY, 2**60, 1.5)),
        _renumbered("images", "image_id", {7: "x"}),
    ],
    "missing or invalid area": _each("annotations", "area", MISSING, -1, HUGE, INFINITY, NAN, "80"),
    "missing or invalid iscrowd": [
        _without("annotations", 0, "iscrowd"),
        _set("annotations", 1, iscrowd=True),
    ],
    "ignored box": [_set("annotations", 0, ignore=1)],
    "invalid segmentation": _each(
        *("annotations", "segmentation"),
        *([[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], [[1, 2, 3, 4, 5, HUGE]], [3], "text", 3, {}),
        *({"counts": [1], "size": [30, 40]}, {"counts": [1200], "size": "ab"}),
        {"counts": [-1, 1201], "size": [30, 40]},
    ),
    "invalid keypoints": _each(
        "annotations", "keypoints", ["1", 2, 2], [1, 2], "text", 3, [HUGE, 1, 2]
    ),
}


def test_every_kind_has_a_case():
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "data"), [(kind, data) for kind, cases in CASES.items() for data in cases]
)
def test_problem_is_found(folder, kind, data):
    report = _check(folder, data)
    severity, advice = KINDS[kind]
    assert report.counts[kind] == 1
    line = report.describe(kind)
    assert kind in line and advice in line and report.examples[kind] in line
    assert bool(report.error()) == (severity is Severity.ERROR)
    assert f"{severity.value}: {line}" in str(report)
    if severity is Severity.ERROR:
        assert "labels.json cannot be used" in report.error() and "\n" not in report.error()
        assert not report.data.get("annotations")
        return
    assert report.repaired == (severity is Severity.REPAIRED)
    # A second check finds nothing to repair.
    again = _check(folder, report.data)
    assert not again.error() and not again.repaired
    assert len(report.data["annotations"]) >= 1


def test_all_kinds_are_counted_at_once(folder):
    data = copy.deepcopy(GOOD)
    for number in range(5):
        flat, lost = {"id": 10 + number, "bbox": [0, 0, 0, 1]}, {"id": 20 + number, "image_id": 99}
        data["annotations"] += [{**GOOD["annotations"][0], **wrong} for wrong in (flat, lost)]
    report = _check(folder, data)
    assert report.counts == {"box without area": 5, "annotation of an unknown image": 5}
    assert len(report.data["annotations"]) == 3


def test_repairs_do_the_obvious(folder):
    def repaired(data: dict) -> list[dict]:
        return _check(folder, data).data["annotations"]

    assert repaired(_set("annotations", 0, bbox=[35, 2, 15, 8]))[0]["bbox"] == [35, 2, 5, 8]
    assert repaired(_set("annotations", 0, bbox=[-2, -3, 9, 99]))[0]["bbox"] == [0, 0, 7, 30]
    assert repaired(_set("annotations", 0, bbox=[35, 2, 15, 8], area=120))[0]["area"] == 40
    assert repaired(_set("annotations", 0, bbox=[35, 2, 15, 8], area=9))[0]["area"] == 9
    # Rounding at the border is no mistake.
    assert repaired(_set("annotations", 0, bbox=[30.5, 2, 10, 8]))[0]["bbox"] == [30.5, 2, 10, 8]
    assert repaired(_without("annotations", 0, "area"))[0]["area"] == 80
    assert repaired(_set("annotations", 0, iscrowd="yes"))[0]["iscrowd"] == 1
    assert repaired(_set("annotations", 1, iscrowd="no"))[1]["iscrowd"] == 0
    assert repaired(_set("annotations", 0, ignore=1))[0]["iscrowd"] == 1
    assert repaired(_set("annotations", 0, ignore="0"))[0]["iscrowd"] == 0
    assert [a["id"] for a in repaired(_set("annotations", 1, id=1))] == [1, 2, 3]
    # The boxes of an image that is left out are left out too, and not counted.
    report = _check(folder, _set("images", 0, file_name="no.png"))
    assert [i["id"] for i in report.data["images"]] == [9]
    assert report.counts["annotation of an unknown image"] == 0
    assert [a["image_id"] for a in report.data["annotations"]] == [9]


def test_size_is_compared_after_rotation(folder):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 40)).save(folder / "a.jpg", exif=exif)
    assert not _check(folder, _set("images", 0, file_name="a.jpg")).counts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 1), st.data())
def test_no_content_is_too_strange(tmp_path_factory, where, index, data):
    folder = tmp_path_factory.mktemp("strange")
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    Image.new("RGB", (30, 40)).save(folder / "b.png")
    changed = copy.deepcopy(GOOD)
    key = data.draw(st.sampled_from([*GOOD[where][index], "segmentation", "ignore"]))
    changed[where][index][key] = data.draw(json_values)
    report = _check(folder, changed)
    assert report.error() or report.data["annotations"]
    assert "\n" not in report.error()


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def _arguments(folder: Path, train: object, val: object, **others) -> argparse.Namespace:
    values = {
        "train_json": train and str(_write(folder / "train.json", train)),
        "train_images": train and str(folder),
        "val_json": val and str(_write(folder / "val.json", val)),
        "val_images": val and str(folder),
        "eval_only": False,
    }
    return argparse.Namespace(**{**values, **others})


def test_configuration_points_at_the_files(folder, cfg, capsys):
    apply_json_datasets(cfg, _arguments(folder, GOOD, GOOD))
    assert cfg.DATASETS.TRAIN == ("own_train",) and cfg.DATASETS.TEST == ("own_val",)
    for node in (cfg.MODEL.SET_DETECTOR, cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        assert node.NUM_CLASSES == 2
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    assert capsys.readouterr().out.count("2 images, 3 boxes, 2 classes") == 2
    assert MetadataCatalog.get("own_train").thing_classes == ["cat", "dog"]
    first, second = DatasetCatalog.get("own_train")
    assert first["file_name"] == str(folder / "a.png") and first["image_id"] == 7
    assert [a["category_id"] for a in first["annotations"]] == [0, 1]
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 1]
    assert second["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    # No repairs, so the original files are read.
    assert MetadataCatalog.get("own_val").json_file == str(folder / "val.json")
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_keys_of_the_command_line_are_kept(folder, cfg):
    keys = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", True, "SOLVER.REFERENCE_WORLD_SIZE", 8]
    cfg.merge_from_list(keys)
    apply_json_datasets(cfg, _arguments(folder, GOOD, None, opts=list(map(str, keys))))
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and cfg.SOLVER.REFERENCE_WORLD_SIZE == 8


def test_later_files_replace_earlier_ones(folder, cfg):
    apply_json_datasets(cfg, _arguments(folder, GOOD, None))
    assert cfg.DATASETS.TEST == ()
    one = _changed(lambda d: d["categories"].pop(0) and d["annotations"].__delitem__(slice(1, 3)))
    apply_json_datasets(cfg, _arguments(folder, one, None))
    assert MetadataCatalog.get("own_train").thing_classes == ["cat"]
    assert cfg.MODEL.SET_DETECTOR.NUM_CLASSES == 1
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get("own_train")) == 1


def _perfect_ap(name: str, output: Path) -> float:
    """Return the AP of detections that equal the annotations."""
    evaluator = BoxEvaluator(name, str(output))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes = [a for a in record["annotations"] if not a["iscrowd"]]
        found = Instances((record["height"], record["width"]))
        corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in boxes]
        found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
        found.pred_classes = torch.tensor([a["category_id"] for a in boxes], dtype=torch.int64)
        found.scores = torch.ones(len(boxes))
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


def test_evaluator_reads_the_repaired_file(folder, cfg):
    val = _renumbered("categories", "category_id", {3: 8, 5: 2})  # in another order
    del val["annotations"][0]["area"], val["annotations"][2]["iscrowd"]
    val["annotations"][2].update(id=1, bbox=[10, 0, 35, 40])
    val["annotations"].append({"image_id": 9, "category_id": 2, "bbox": [NAN, 0, 1, 1]})
    apply_json_datasets(cfg, _arguments(folder, GOOD, val))
    file = Path(MetadataCatalog.get("own_val").json_file)
    assert file.parent == Path(cfg.OUTPUT_DIR) / "annotations"
    assert list(file.parent.iterdir()) == [file]
    records = DatasetCatalog.get("own_val")
    assert MetadataCatalog.get("own_val").thing_classes == ["cat", "dog"]
    assert [a["category_id"] for r in records for a in r["annotations"]] == [0, 1, 1]
    assert records[1]["annotations"][0]["bbox"] == [10, 0, 20, 40]
    assert _perfect_ap("own_val", Path(cfg.OUTPUT_DIR)) == pytest.approx(100)


def test_another_command_keeps_the_repaired_file(folder, cfg):
    def repaired(val: dict) -> Path:
        apply_json_datasets(cfg, _arguments(folder, None, val, eval_only=True))
        return Path(MetadataCatalog.get("own_val").json_file)

    first = repaired(_without("annotations", 0, "area"))
    content = first.read_bytes()
    assert repaired(_without("annotations", 2, "area")) != first
    assert first.read_bytes() == content


def test_text_ids_are_evaluated(folder, cfg):
    val = _renumbered("images", "image_id", {7: "image 7", 9: "image 9"})
    apply_json_datasets(cfg, _arguments(folder, None, val, eval_only=True))
    assert cfg.DATASETS.TRAIN == () and cfg.MODEL.SET_DETECTOR.NUM_CLASSES == 2
    assert _perfect_ap("own_val", Path(cfg.OUTPUT_DIR)) == pytest.approx(100)


@pytest.mark.parametrize(
    ("train", "val", "others", "message"),
    [
        (GOOD, GOOD, {"val_images": None}, "--val-json and --val-images go together"),
        (GOOD, GOOD, {"train_json": None}, "--train-json and --train-images go together"),
        (GOOD, None, {"train_images": "/no/folder"}, "--train-images /no/folder is not a folder"),
        (GOOD, None, {"train_json": "/no/file.json"}, "/no/file.json cannot be used: unreadable"),
        (None, GOOD, {}, "--val-json alone can only be evaluated"),
        (GOOD, WOLF, {}, "'dog' only in .*train.json; 'wolf' only in .*val.json"),
        (
            *(_set("categories", 0, id=3), _set("images", 0, id=9), {}),
            "train.json cannot be used: duplicate category id.*; .*val.json cannot .* image id: 1",
        ),
    ],
)
def test_wrong_files_are_explained_in_one_line(folder, cfg, train, val, others, message):
    with pytest.raises(UserError, match=message) as error:
        apply_json_datasets(cfg, _arguments(folder, train, val, **others))
    assert "\n" not in str(error.value)


def test_masks_need_outlines(folder, cfg):
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UserError, match="3 annotations .* have no segmentation .first: id 1."):
        apply_json_datasets(cfg, _arguments(folder, GOOD, None))
    outlined = copy.deepcopy(GOOD)
    for annotation in outlined["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    apply_json_datasets(cfg, _arguments(folder, outlined, None))
    first, second = DatasetCatalog.get("own_train")
    assert all("segmentation" in a for a in first["annotations"] + second["annotations"])
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(UserError, match="MODEL.KEYPOINT_ON is set"):
        apply_json_datasets(cfg, _arguments(folder, outlined, None))


@pytest.mark.parametrize(
    ("architecture", "queries", "detections", "keys"),
    [
        ("SetDetector", 2, 3, "MODEL.DYNAMIC_DECODER.NUM_QUERIES"),
        ("SetDetector", 3, 2, "TEST.DETECTIONS_PER_IMAGE"),
        ("SetDetector", 2, 2, "MODEL.DYNAMIC_DECODER.NUM_QUERIES and TEST.DETECTIONS_PER_IMAGE"),
        ("GeneralizedRCNN", 1, 2, "TEST.DETECTIONS_PER_IMAGE"),
    ],
)
def test_images_with_more_boxes_than_detections_are_counted(
    folder, cfg, capsys, architecture, queries, detections, keys
):
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.DYNAMIC_DECODER.NUM_QUERIES = queries
    cfg.TEST.DETECTIONS_PER_IMAGE = detections
    crowded = copy.deepcopy(GOOD)
    box = crowded["annotations"][0]
    crowded["annotations"] += [{**box, "id": 4}]  # two boxes, and a region with iscrowd
    apply_json_datasets(cfg, _arguments(folder, crowded, None))
    assert "detected in an image" not in capsys.readouterr().out
    crowded["annotations"] += [{**box, "id": 5}]
    apply_json_datasets(cfg, _arguments(folder, crowded, None))
    line = "1 of 2 images have more boxes than the 2 that are detected in an image, up to 3; "
    assert f"{line}increase {keys}\n" in capsys.readouterr().out


def test_folder_that_cannot_be_written_is_named(folder, cfg):
    cfg.OUTPUT_DIR = str(folder / "a.png")
    with pytest.raises(UserError, match="repaired annotations cannot be written"):
        apply_json_datasets(cfg, _arguments(folder, _without("annotations", 0, "area"), None))


@pytest.mark.parametrize(
    ("name", "expected"), [("bccd", (3, 292, 3941)), ("coco_cc", (80, 85, 764))]
)
def test_real_data_needs_no_repair(name, expected, request, cfg):
    data: Path = request.getfixturevalue(name)
    values = {}
    for split in ("train", "val"):
        values[f"{split}_json"] = str(data / "annotations" / f"instances_{split}.json")
        values[f"{split}_images"] = str(data / split)
    reports = apply_json_datasets(cfg, argparse.Namespace(**values, eval_only=False))
    assert not any(report.repaired for report in reports)
    boxes = [len(r["annotations"]) for r in DatasetCatalog.get("own_train")]
    assert (cfg.MODEL.SET_DETECTOR.NUM_CLASSES, len(boxes), sum(boxes)) == expected
