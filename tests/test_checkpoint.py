"""Checkpoints: atomic, plain data, few, and with clear messages if they do not fit."""

import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.ema import ModelEMA
from dynamic_detr.errors import UserError
from dynamic_detr.files.writing import write_atomically


class Detector(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.class_logits = nn.Linear(width, classes)


class State:
    """Object with a state, in place of the trainer."""

    def __init__(self, value: int = 0):
        self.value = value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def _checkpointer(folder: Path, model: nn.Module | None = None, **options) -> SafeCheckpointer:
    options.setdefault("trainer", State())
    return SafeCheckpointer(model or Detector(), str(folder), **options)


def _save(checkpointer: SafeCheckpointer, iteration: int) -> Path:
    checkpointer.checkpointables["trainer"].value = iteration
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    path = Path(checkpointer.save_dir) / f"model_{iteration:07d}.pth"
    os.utime(path, (iteration, iteration))  # distinct times
    return path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new, but not all of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert _names(tmp_path) == ["file"]


def test_the_newest_few_are_kept(tmp_path):
    checkpointer = _checkpointer(tmp_path, keep=2)
    for iteration in (2, 4, 6):
        _save(checkpointer, iteration)
    checkpointer.save("model_final", iteration=6)
    assert _names(tmp_path) == [
        "last_checkpoint",
        "model_0000004.pth",
        "model_0000006.pth",
        "model_final.pth",
    ]
    with pytest.raises(UserError, match="KEEP_CHECKPOINTS is 1"):
        _checkpointer(tmp_path, keep=1)


def test_parts_of_killed_saves_are_removed(tmp_path):
    kept = [".model_0000003.pth", "model_part", ".other.part"]
    for name in (*kept, ".model_0000003.pth.part", ".model_best.safetensors.part"):
        (tmp_path / name).touch()
    _checkpointer(tmp_path).files.remove_parts()
    assert _names(tmp_path) == sorted(kept)


def test_zero_keeps_all(tmp_path):
    checkpointer = _checkpointer(tmp_path, keep=0)
    for iteration in range(4):
        _save(checkpointer, iteration)
    assert len(list(tmp_path.glob("model_*.pth"))) == 4


def test_files_hold_the_average_for_users_and_the_weights_for_training(tmp_path, caplog):
    model = Detector()
    ema = ModelEMA(model, 0.5)
    with torch.no_grad():
        model.body.weight += 1
    ema.update()
    path = _save(_checkpointer(tmp_path, model, ema=ema), 7)

    plain = torch.load(path, weights_only=True)  # allows tensors and plain types only
    assert torch.equal(plain["model"]["body.weight"], ema.state_dict()["body.weight"])
    assert torch.equal(plain["model_training"]["body.weight"], model.body.weight)
    assert not torch.equal(plain["model"]["body.weight"], model.body.weight)

    detectron2_model = Detector()
    DetectionCheckpointer(detectron2_model).load(str(path))
    assert torch.equal(detectron2_model.body.weight, ema.state_dict()["body.weight"])

    resumed = Detector()
    average = ModelEMA(resumed, 0.5)
    state = State()
    _checkpointer(tmp_path, resumed, ema=average, trainer=state).resume()
    assert torch.equal(resumed.body.weight, model.body.weight)
    assert torch.equal(average.state_dict()["body.weight"], ema.state_dict()["body.weight"])
    assert average.updates == 1 and state.value == 7

    _checkpointer(tmp_path, Detector()).resume()
    assert f"the moving average in {path} is not continued" in caplog.text

    tuned = Detector()
    average = ModelEMA(tuned, 0.5)
    _checkpointer(tmp_path, tuned, ema=average).load(str(path), checkpointables=[])
    assert torch.equal(tuned.body.weight, ema.state_dict()["body.weight"])
    assert torch.equal(average.state_dict()["body.weight"], tuned.body.weight)
    assert average.updates == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "other"])
def test_a_broken_last_one_falls_back_to_the_one_before(tmp_path, caplog, damage):
    checkpointer = _checkpointer(tmp_path)
    for iteration in (2, 4, 6):
        path = _save(checkpointer, iteration)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_text("something else")
    state = State()
    resumed = _checkpointer(tmp_path, trainer=state)
    with caplog.at_level(logging.WARNING):
        resumed.resume()
    assert state.value == 4
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "model_0000006.pth" in warnings[0] and "falling back" in warnings[0]
    assert resumed.last_whole_file().endswith("model_0000004.pth")


def test_nothing_to_resume(tmp_path):
    assert _checkpointer(tmp_path).resume() is None
    with pytest.raises(UserError, match="no checkpoint in OUTPUT_DIR"):
        _checkpointer(tmp_path).last_whole_file()
    path = _save(_checkpointer(tmp_path), 2)
    os.truncate(path, 10)
    with pytest.raises(UserError, match="no checkpoint of the latest run in .* can be read"):
        _checkpointer(tmp_path).resume()


def test_other_classes_are_initialised_anew_and_the_rest_loads(tmp_path, caplog):
    source, target = Detector(classes=80), Detector(classes=3)
    path = _save(_checkpointer(tmp_path, source), 1)
    before = target.class_logits.weight.clone()
    with caplog.at_level(logging.WARNING):
        _checkpointer(tmp_path, target).load(str(path), checkpointables=[])
    assert torch.equal(target.body.weight, source.body.weight)
    assert torch.equal(target.class_logits.weight, before)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "class_logits.weight" in warnings[0] and "class_logits.bias" in warnings[0]


def test_evaluation_refuses_other_classes(tmp_path):
    path = _save(_checkpointer(tmp_path, Detector(classes=80)), 1)
    with pytest.raises(UserError, match="80 rows there and 3 here"):
        _checkpointer(tmp_path, Detector(classes=3), strict_classes=True).load(str(path))


@pytest.mark.parametrize("other", [{"width": 8}, {"classes": 80}])
def test_resuming_refuses_another_model(tmp_path, other):
    _save(_checkpointer(tmp_path, Detector(**other)), 1)
    with pytest.raises(UserError, match="saved by another model"):
        _checkpointer(tmp_path, Detector()).resume()


def test_layers_of_another_width_are_named(tmp_path, caplog):
    path = _save(_checkpointer(tmp_path, Detector(width=8)), 1)
    with caplog.at_level(logging.WARNING):
        _checkpointer(tmp_path, Detector(width=4)).load(str(path), checkpointables=[])
    assert any("another shape" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["absent.pth", "text.pth", "list.pth", "text.pkl"])
def test_weights_that_are_none_are_named(tmp_path, name):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("not weights")
    elif name.startswith("list"):
        torch.save({"model": {"body.weight": "text"}}, path)
    with pytest.raises(UserError, match=name):
        _checkpointer(tmp_path).load(str(path), checkpointables=[])


def test_an_address_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    checkpointer = _checkpointer(tmp_path)

    def refuse(path, **_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", refuse)
    with pytest.raises(UserError, match="could not fetch .*R-50.pkl.*unreachable.*MODEL.WEIGHTS"):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")


def test_half_precision_weights_load_into_a_float32_model(tmp_path):
    model = Detector()
    path = tmp_path / "half.pth"
    torch.save({"model": {k: v.half() for k, v in model.state_dict().items()}}, path)
    loaded = Detector()
    _checkpointer(tmp_path, loaded).load(str(path), checkpointables=[])
    assert loaded.body.weight.dtype is torch.float32
    torch.testing.assert_close(loaded.body.weight, model.body.weight, rtol=1e-3, atol=1e-3)
