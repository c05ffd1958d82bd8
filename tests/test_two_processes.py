"""Two processes on the CPU: exit codes, statistics of norms, signals, and restarts by torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny_run import (
    write_config,
    write_data,
)

from dynamic_detr.cli.launch import launch
from dynamic_detr.engine.batch_norm import RunningStatistics
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def _fail_on_the_second(code: int) -> None:
    from detectron2.utils import comm

    if comm.get_rank() == 1:
        sys.exit(code)


def test_the_exit_code_of_a_failed_process_is_handed_on():
    with pytest.raises(SystemExit) as error:
        launch(_fail_on_the_second, 2, on_gpu=False, args=(7,))
    assert error.value.code == 7


def _evaluate_own_statistics(folder: Path) -> None:
    from detectron2.utils import comm

    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean += comm.get_rank()
    step = SimpleNamespace(stop_agreed=False, statistics=RunningStatistics(norm))
    trainer = SimpleNamespace(_trainer=step, ema=None)
    means = Trainer._with_averaged_weights(trainer, norm.running_mean.tolist)
    (folder / f"{comm.get_rank()}").write_text(str(means))


def test_all_processes_evaluate_the_statistics_of_the_first(tmp_path):
    launch(_evaluate_own_statistics, 2, on_gpu=False, args=(tmp_path,))
    assert [(tmp_path / name).read_text() for name in "01"] == ["[0.0, 0.0]"] * 2


def test_several_machines_need_an_address():
    with pytest.raises(UserError, match="--dist-url"):
        launch(print, 1, on_gpu=False, num_machines=2)


def _torchrun(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    json_file, images = write_data(folder / "data")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(*launcher, "--no-python", sys.executable, str(ROOT / "train_net.py")),
        *("--config-file", str(write_config(folder)), "--num-gpus", "0"),
        *("--train-json", str(json_file), "--train-images", str(images)),
        *(*options, "OUTPUT_DIR", str(folder / "output")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def _signal_one(process: subprocess.Popen, number: signal.Signals) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), number)


def test_torchrun_trains_and_both_processes_stop_at_sigterm(tmp_path):
    """After SIGTERM to one process, both stop at the same iteration and exit with 0; one saves."""
    output = tmp_path / "output"
    process = _torchrun(tmp_path, "SOLVER.MAX_ITER", "5000")
    _wait_for(output / "last_checkpoint", process)
    _signal_one(process, signal.SIGTERM)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert errors.count("stopped by SIGTERM") == 1
    saved = (output / "last_checkpoint").read_text()
    assert torch.load(output / saved, weights_only=True)["iteration"] >= 2


@pytest.mark.long
def test_torchrun_restarts_a_run_that_has_lost_a_process(tmp_path):
    options = ("SOLVER.MAX_ITER", "300", "SOLVER.STEPS", "(250,)")
    process = _torchrun(tmp_path, "--resume", *options, launcher=("--max-restarts", "1"))
    _wait_for(tmp_path / "output" / "last_checkpoint", process)
    _signal_one(process, signal.SIGKILL)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("train_net.py: ")]
    assert len(lines) == 1 and "process 1 on" in lines[0] and "ended without a word" in lines[0]
    assert (
        torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["iteration"] == 299
    )
