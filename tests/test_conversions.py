"""Conversion of published weights: reading files, renaming, and selecting class rows."""

import argparse
import os
import pathlib
from pathlib import Path

import convert_weights
import pytest
import torch
from conversions import rename, select_coco_classes
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from dynamic_detr.errors import UserError

THINGS = [c for c in COCO_CATEGORIES if c["isthing"]]


class Harmful:
    """Object that runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reading_runs_no_pickled_code(zipped, tmp_path):
    path, touched = tmp_path / "weights.pth", tmp_path / "touched"
    args = argparse.Namespace(lr=1e-4, output=pathlib.PosixPath("out"), steps=[1, 2])
    data = {"model": {"module.a": torch.ones(2), "step": 3}, "args": args, "x": Harmful(touched)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    try:
        weights = convert_weights.read_weights(path)
    except UserError as error:  # refused, rather than skipped
        assert "cannot be read" in str(error)
    else:
        assert list(weights) == ["a"] and weights["a"].tolist() == [1, 1]
    assert not touched.exists()
    del data["x"]
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    assert list(convert_weights.read_weights(path)) == ["a"]


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert convert_weights.read_weights(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]


def test_files_without_weights_raise_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    for name, reason in (("none.pth", "does not exist; pass"), ("text.pth", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            convert_weights.read_weights(tmp_path / name)
    with pytest.raises(UserError, match="contains no dict of tensors"):
        convert_weights.read_weights(tmp_path / "epoch.pth")


def test_unknown_and_duplicate_names_raise():
    rules = [(r"drop\..*", None), (r"(\w)\.[12]", r"new.\1")]
    one, two = torch.ones(1), torch.zeros(1)
    assert list(rename({"a.1": one, "drop.x": two, "a.2": one}, rules)) == ["new.a"]
    with pytest.raises(UserError, match="b.3 is left over"):
        rename({"b.3": one}, rules)
    with pytest.raises(UserError, match="a.2 is one of two different weights for new.a"):
        rename({"a.1": one, "a.2": two}, rules)


@pytest.mark.parametrize("no_object", [0, 1])
def test_class_rows_are_selected_by_coco_id(no_object):
    """A wrong selection would give right boxes with wrong classes."""
    ids = torch.arange(91 + no_object)
    weight = ids[:, None].float().expand(-1, 4)
    model = {"w": torch.zeros(80 + no_object, 4), "b": torch.zeros(80 + no_object)}
    fitted = convert_weights.fit({"w": weight, "b": ids.float()}, model, num_classes=80)
    wanted = [c["id"] for c in THINGS] + [91] * no_object
    assert fitted["b"].tolist() == wanted
    assert fitted["w"][:, 0].tolist() == wanted
    names = {c["id"]: c["name"] for c in THINGS}
    assert names[wanted[0]] == "person" and names[wanted[79]] == "toothbrush"
    assert names[wanted[11]] == "stop sign" and wanted[11] == 13  # ids have gaps from 12 on
    assert torch.equal(select_coco_classes(ids), fitted["b"].long())


def test_rows_of_custom_classes_are_kept():
    rows = {"b": torch.arange(91)}
    assert convert_weights.fit(rows, rows, num_classes=91)["b"].tolist() == list(range(91))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": (2,)}, "missing: b"),
        ({"a": (2,), "b": (3,), "c": (1,)}, "left over: c"),
        ({"b": (3,), "c": (1,)}, "missing: a; left over: c"),
        ({"a": (2,), "b": (4,)}, r"b is \(4,\) in the file, but \(3,\) in the model"),
    ],
)
def test_weights_that_do_not_fit_raise(weights, reason):
    model = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=reason):
        convert_weights.fit({k: torch.zeros(s) for k, s in weights.items()}, model, 80)
