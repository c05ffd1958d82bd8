"""Full disks and unusable folders cause one line, not a traceback."""

import atexit
import errno
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from detectron2.utils.logger import setup_logger
from test_train_net import _arguments, _run
from tiny_run import make_config, train
from torch import nn

from dynamic_detr.cli.console import logging_to
from dynamic_detr.cli.output_dir import require_output_dir
from dynamic_detr.cli.signals import listening
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.evaluation import BoxEvaluator
from dynamic_detr.engine.stopping import TrainingStopped, stop_request
from dynamic_detr.engine.writers import PatientWriter
from dynamic_detr.errors import UserError

FULL = Path("/dev/full")  # behaves like a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def _full(path: Path) -> Path:
    """Make writing to ``path`` fail as on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(FULL)
    return path


def test_output_dirs_that_cannot_be_are_told(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("", str(file), f"{file}/below", str(tmp_path / "loop"), f"{tmp_path}/loop/a"):
        with pytest.raises(UserError, match="OUTPUT_DIR .*(set it to a|choose another) folder"):
            require_output_dir(folder)
    require_output_dir(str(tmp_path / "new" / "one"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root may write anywhere
    with pytest.raises(UserError, match="OUTPUT_DIR .* read-only"):
        require_output_dir(str(tmp_path / "new"))


@pytest.mark.parametrize("options", [[], ["--eval-only"], ["--resume"]])
def test_the_command_tells_of_output_dirs(tmp_path, monkeypatch, capsys, options):
    (tmp_path / "file").write_text("")
    places = ["", str(tmp_path / "file"), "/proc/self/output", str(tmp_path / ("a" * 300))]
    for place in places:
        arguments = _arguments(tmp_path, *options, "OUTPUT_DIR", place)
        assert _run(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("\n") == 1, said
        assert said.startswith(f"train_net.py: error: OUTPUT_DIR {place}"[:60])


@needs_full
def test_a_full_disk_while_saving(tmp_path):
    _full(tmp_path / ".model.pth.part")
    checkpointer = SafeCheckpointer(nn.Linear(2000, 2000), str(tmp_path))
    with pytest.raises(UserError, match=r"could not write .*model.pth \(the disk is full\)"):
        checkpointer.save("model")


@needs_full
def test_a_full_disk_while_logging_and_counting(tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    _full(output / "log.txt")
    _full(output / "metrics.json")
    arguments = _arguments(tmp_path, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "2")
    assert _run(monkeypatch, *arguments) == 0
    said = capsys.readouterr().err
    warnings = [line for line in said.splitlines() if "the disk is full" in line]
    assert "Traceback" not in said and "Logging error" not in said
    assert len(warnings) == 2 and "log.txt" in warnings[0] and "JSONWriter" in warnings[1]
    assert (output / "model_final.pth").exists()


def test_metrics_come_once_there_is_room_again(tmp_path, monkeypatch, capsys):
    writer = PatientWriter(partial(JSONWriter, str(tmp_path / "metrics.json")))
    writer.open()
    with EventStorage() as storage:
        for fsync in (os.fsync, _fail, _fail, os.fsync):
            monkeypatch.setattr(os, "fsync", fsync)
            storage.put_scalar("loss", 1.0)
            writer.write()
            storage.step()
    writer.close()
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("the disk is full") == 1


def _fail(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@needs_full
@pytest.mark.parametrize("name", ["instances_predictions.pth", "coco_instances_results.json"])
def test_a_full_disk_while_writing_detections(tmp_path, monkeypatch, capsys, name):
    output = tmp_path / "output"
    _full(output / "inference" / name)
    arguments = _arguments(tmp_path, "--eval-only", "OUTPUT_DIR", str(output))
    assert _run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("inference cannot be written (the disk is full)"), said


@needs_full
def test_a_full_disk_in_an_evaluation_of_training(tmp_path):
    cfg = make_config(tmp_path, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ("tiny_train",))
    _full(Path(cfg.OUTPUT_DIR) / "inference" / "instances_predictions.pth")
    with pytest.raises(TrainingStopped) as stop:
        train(cfg)
    assert "inference cannot be written (the disk is full)" in stop.value.message
    assert (Path(cfg.OUTPUT_DIR) / "model_0000001.pth").exists()


@needs_full
def test_a_full_disk_after_a_signal(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, "TEST.EVAL_PERIOD", 1, "DATASETS.TEST", ("tiny_train",))

    def process(*_) -> None:
        _full(Path(cfg.OUTPUT_DIR) / ".model_0000000.pth.part")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(BoxEvaluator, "process", process)
    with pytest.raises(TrainingStopped) as stop, listening(stop_request):
        train(cfg)
    assert stop.value.code == 2
    assert "model_0000000.pth (the disk is full)" in stop.value.message


@needs_full
def test_a_full_disk_at_the_end_of_a_process(tmp_path, monkeypatch, capsys):
    """Closing the log and flushing standard output at exit print no further errors."""
    log, at_exit = _full(tmp_path / "log.txt"), []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    with open(FULL, "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        try:
            with logging_to(str(tmp_path), "full_disk"):
                logger = setup_logger(str(tmp_path), 0, name="full_disk")
            for _ in range(3):
                logger.info("text")
            for function, *arguments in reversed(at_exit):  # as the interpreter does
                function(*arguments)
            full.flush()
        finally:
            setup_logger.cache_clear()
    end = "cannot be written (the disk is full); the run continues without it"
    said = sorted(capsys.readouterr().err.splitlines())
    assert said == sorted(f"warning: {name} {end}" for name in (log, FULL))
    assert len(at_exit) == 3  # Detectron2's for the log, and one for each stream
