"""OUTPUT_DIR: checkpoints of several runs in it, and the lock of the run that writes to it."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from test_train_net import _arguments, _run
from tiny_run import make_config, train
from torch import nn

from dynamic_detr.cli import output_dir
from dynamic_detr.cli.output_dir import _Lock, output_locked
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.checkpoint_folder import started_with
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError


def _run_of(folder: Path, started: float, iterations: tuple, keep: int = 0) -> SafeCheckpointer:
    """Return a checkpointer of a run that has saved after these iterations."""
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(folder), keep=keep)
    checkpointer.files.run["started"] = started
    for iteration in iterations:
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def _resumed(folder: Path) -> SafeCheckpointer:
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(folder), keep=2)
    checkpointer.resume()
    return checkpointer


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_the_newest_checkpoint_of_the_latest_run_is_resumed(tmp_path):
    first = _run_of(tmp_path, 1.0, (50, 90))
    last = _run_of(tmp_path, 2.0, (3, 12))
    (tmp_path / "last_checkpoint").unlink()
    for path in tmp_path.iterdir():  # as after a copy in any order
        os.utime(path, (int(path.stem[-2:]) * 7 % 60,) * 2)
    resumed = _resumed(tmp_path)
    assert resumed.last_iteration == 12 and resumed.files.run == last.files.run != first.files.run
    (tmp_path / "model_0000012.pth").unlink()
    assert _resumed(tmp_path).last_iteration == 3


def test_a_run_deletes_its_own_checkpoints_alone(tmp_path):
    first = _run_of(tmp_path, 1.0, (2, 4))
    name = first.files.run["id"]
    _run_of(tmp_path, 2.0, (3, 4, 5), keep=2)
    assert _names(tmp_path) == [
        "model_0000002.pth",
        "model_0000004.pth",
        f"model_0000004_{name}.pth",
        "model_0000005.pth",
    ]
    resumed = _resumed(tmp_path)
    for iteration in (5, 6):  # the one that is there already is its own
        resumed.save(f"model_{iteration:07d}", iteration=iteration)
    assert _names(tmp_path) == [
        "model_0000002.pth",
        f"model_0000004_{name}.pth",
        "model_0000005.pth",
        "model_0000006.pth",
    ]


@pytest.mark.parametrize(
    "run",
    [None, "abc", {}, {"id": "../../ab", "started": 1.0, "processes": 1}]
    + [{"id": "0123abcd", "started": "now", "processes": 1}],
)
def test_a_run_that_is_none_is_told(tmp_path, caplog, run):
    _run_of(tmp_path, 1.0, (1,))
    torch.save({"model": {}, "iteration": 7, "run": run}, tmp_path / "model_0000007.pth")
    assert _resumed(tmp_path).last_iteration == 1
    assert "model_0000007.pth" in caplog.text and "its run is" in caplog.text


def test_a_new_run_among_checkpoints_is_the_one_that_is_resumed(tmp_path, caplog):
    train(make_config(tmp_path, "SOLVER.MAX_ITER", 4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").glob("*.pth")}
    cfg = make_config(tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 9)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([])
    trainer.run_step = _killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "has checkpoints of an earlier run" in caplog.text
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 0
    assert resumed.checkpointer.files.run == trainer.checkpointer.files.run
    resumed.train()
    after = {path.read_bytes() for path in (tmp_path / "output").glob("*.pth")}
    assert set(before.values()) <= after


def _killed() -> None:
    raise KeyboardInterrupt


def test_a_schedule_stays_that_of_the_processes_it_was_started_with(tmp_path):
    options = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 12]
    cfg = make_config(tmp_path, *options, "SOLVER.STEPS", (10,))
    assert started_with(cfg.OUTPUT_DIR) is None
    trainer = Trainer(cfg, scale_to=2)
    trainer.checkpointer.files.run["processes"] = 2  # as of a run on two
    trainer.checkpointer.save("model_0000001", iteration=1)
    assert started_with(cfg.OUTPUT_DIR) == 2
    resumed = Trainer(cfg, started_with(cfg.OUTPUT_DIR))
    resumed.resume_or_load(resume=True)
    solver = resumed.cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS) == (4, 6, (5,))
    resumed.checkpointer.save("model_0000003", iteration=3)
    assert started_with(cfg.OUTPUT_DIR) == 2


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.OPTIMIZER", "SGD"], "optimiser is AdamW and the configuration's SGD"),
        (["SOLVER.MAX_ITER", "1"], "2 iterations are done already and SOLVER.MAX_ITER is 1"),
        (["DATALOADER.SAMPLER_TRAIN", "Random"], "SAMPLER_TRAIN"),
        (["MODEL.WEIGHTS", "absent.pth"], "absent.pth do not exist"),
    ],
)
def test_a_refused_run_changes_no_file(tmp_path, monkeypatch, capsys, options, message):
    arguments = ["OUTPUT_DIR", str(tmp_path / "output"), "SOLVER.MAX_ITER", "2"]
    assert _run(monkeypatch, *_arguments(tmp_path, *arguments)) == 0
    before = _contents(tmp_path / "output")
    assert len(before) >= 5 and str(tmp_path / "output" / "config.yaml") in before
    capsys.readouterr()
    resume = [] if "MODEL.WEIGHTS" in options else ["--resume"]
    assert _run(monkeypatch, *_arguments(tmp_path, *resume, *arguments, *options)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert _contents(tmp_path / "output") == before


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path):
    folder = tmp_path / "output"
    with output_locked(str(folder)):
        with (
            pytest.raises(
                UserError,
                match=rf"in use by process {os.getpid()} on {socket.gethostname()} since 2",
            ),
            output_locked(str(folder)),
        ):
            pass
        assert (folder / ".running").exists()
    assert not list(folder.iterdir())
    with output_locked(str(folder)):
        pass


def test_the_command_is_refused_while_another_run_writes(tmp_path, monkeypatch, capsys):
    output = str(tmp_path / "output")
    with output_locked(output):
        assert _run(monkeypatch, *_arguments(tmp_path, "OUTPUT_DIR", output)) == 2
        assert [path.name for path in Path(output).iterdir()] == [".running"]
    said = capsys.readouterr().err
    assert f"{output} is in use by process {os.getpid()}" in said and said.count("\n") == 1


def test_the_lock_of_a_killed_process_is_free_although_its_workers_live(tmp_path):
    ready = tmp_path / "ready"
    holder = os.fork()
    if holder == 0:
        os.setsid()
        _Lock(tmp_path / ".running").acquire()
        if os.fork() == 0:  # as a process that loads data
            ready.touch()
        time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 50
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"process {holder}"), output_locked(str(tmp_path)):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with output_locked(str(tmp_path)):
            assert json.loads((tmp_path / ".running").read_text())["pid"] == os.getpid()
    finally:
        os.killpg(holder, signal.SIGKILL)


def test_the_lock_of_another_host_is_taken_over_without_heartbeats(
    tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(output_dir, "_TIMEOUT_SECONDS", 0.6)
    path = tmp_path / ".running"
    path.write_text(json.dumps({"pid": 12, "host": "elsewhere", "since": "today"}))
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    threading.Thread(target=live).start()
    try:
        with (
            pytest.raises(UserError, match="process 12 on elsewhere since today"),
            output_locked(str(tmp_path)),
        ):
            pass
    finally:
        stop.set()
    time.sleep(0.1)
    with output_locked(str(tmp_path)):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "No heartbeat from elsewhere" in caplog.text
    assert capsys.readouterr().out.count("process 12 on elsewhere; waiting") == 2


def test_heartbeats_are_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "_HEARTBEAT_SECONDS", 0.05)
    with output_locked(str(tmp_path)):
        path = tmp_path / ".running"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), output_locked(str(tmp_path)):
        assert (tmp_path / ".running").exists()
    assert "does not support locks (No locks available)" in caplog.text
