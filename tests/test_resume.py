"""A run that is killed and resumed equals an uninterrupted one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny_run import TWO_LEVELS, losses_of, make_config, train, write_config, write_data

from dynamic_detr.cli.signals import listening
from dynamic_detr.engine.evaluation import BoxEvaluator, EvaluationInterrupted
from dynamic_detr.engine.stopping import TrainingStopped, stop_request
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError

# The random numbers of a step, in the model and in the data, must be the same too.
RANDOM = [*TWO_LEVELS, "MODEL.DYNAMIC_DECODER.DROPOUT", 0.2, "INPUT.MIN_SIZE_TRAIN", (48, 64)]
EMA = ["SOLVER.EMA.ENABLED", True]


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics without times."""
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    times = ("time", "data_time", "eta_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def test_resumed_losses_weights_average_and_metrics_are_those_of_the_whole_run(tmp_path):
    whole = train(make_config(tmp_path / "a", *RANDOM, *EMA))
    train(make_config(tmp_path / "b", *RANDOM, *EMA, "SOLVER.MAX_ITER", 3))
    cfg = make_config(tmp_path / "b", *RANDOM, *EMA, "DATALOADER.NUM_WORKERS", 2)
    resumed = train(cfg, resume=True)

    expected = losses_of(whole)
    assert list(losses_of(resumed)) == [3, 4, 5]
    assert losses_of(resumed).items() <= expected.items()
    for averaged in (False, True):
        states = [
            t.ema.state_dict() if averaged else t.detector.state_dict() for t in (whole, resumed)
        ]
        for name, value in states[0].items():
            assert torch.equal(states[1][name], value), name
    until, after = _metrics(tmp_path / "b")  # medians of the steps before and after the stop
    assert until["iteration"] == 2 and [after] == _metrics(tmp_path / "a")
    assert whole.ema.updates == resumed.ema.updates == 6


def test_losses_differ_between_iterations_and_seeds(tmp_path):
    """Otherwise the comparison above would prove nothing."""
    first = losses_of(train(make_config(tmp_path / "a", "SOLVER.BASE_LR", 1e-12)))
    other = losses_of(train(make_config(tmp_path / "b", "SOLVER.BASE_LR", 1e-12, "SEED", 6)))
    assert len(set(first.values())) > 3
    assert first[0] != pytest.approx(other[0], rel=1e-3)


def _command(folder: Path, *options: str) -> list[str]:
    json_file, images = write_data(folder / "data")
    return [
        sys.executable,
        str(ROOT / "train_net.py"),
        *("--config-file", str(write_config(folder)), "--num-gpus", "0"),
        *("--train-json", str(json_file), "--train-images", str(images)),
        *("OUTPUT_DIR", str(folder / "output"), *options),
    ]


def _start_and_signal(folder: Path, number: signal.Signals, *options: str):
    """Run the command and send it a signal once it has saved something."""
    process = subprocess.Popen(
        _command(folder, *options), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 600
    while not (folder / "output" / "last_checkpoint").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.02)
    process.send_signal(number)
    return process.communicate(timeout=600)[1], process.returncode


def test_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    _, code = _start_and_signal(
        tmp_path, signal.SIGKILL, "SOLVER.MAX_ITER", "300", "SOLVER.STEPS", "(250,)"
    )
    assert code == -signal.SIGKILL
    options = ["SOLVER.MAX_ITER", 300, "SOLVER.STEPS", (250,)]
    trainer = Trainer(make_config(tmp_path, *options))
    trainer.resume_or_load(resume=True)
    start = trainer.start_iter
    assert start >= 2 and start % 2 == 0
    trainer.max_iter = start + 2
    trainer.train()

    whole = Trainer(make_config(tmp_path / "whole", *options))
    whole.resume_or_load(resume=False)
    whole.max_iter = start + 2
    whole.train()
    expected = losses_of(whole)
    for iteration, loss in losses_of(trainer).items():
        assert loss == pytest.approx(expected[iteration], rel=1e-5)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    errors, code = _start_and_signal(tmp_path, signal.SIGTERM, "SOLVER.MAX_ITER", "5000")
    assert code == 0
    assert "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert "stopped by SIGTERM" in line and "--resume" in line
    saved = (tmp_path / "output" / "last_checkpoint").read_text()
    checkpoint = torch.load(tmp_path / "output" / saved, weights_only=True)
    assert f"after {checkpoint['iteration'] + 1} of 5000" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_in_an_evaluation_save_the_trained_weights(tmp_path, monkeypatch, number):
    """Signals may arrive twice: a launcher forwards what the whole group has received."""
    options = ["TEST.EVAL_PERIOD", 3, "DATASETS.TEST", ("tiny_train",)]
    trainer = Trainer(make_config(tmp_path, *EMA, *options))
    trainer.resume_or_load(resume=False)
    swap, images = trainer.ema._swap, []

    def swap_and_signal() -> None:
        swap()
        if trainer.iter == 2 and not (trainer.stop and number == signal.SIGINT):
            signal.raise_signal(number)  # a second Ctrl-C would end this process

    def process(self, inputs, outputs) -> None:
        images.append(inputs)

    monkeypatch.setattr(trainer.ema, "_swap", swap_and_signal)
    monkeypatch.setattr(BoxEvaluator, "process", process)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped) as stop, listening(stop_request):
        trainer.train()
    assert stop.value.code == (130 if number == signal.SIGINT else 0)
    assert f"stopped by {number.name} after 3 of 6 iterations; saved" in stop.value.message
    assert not images and signal.getsignal(number) is before
    checkpoint = torch.load(trainer.checkpointer.get_checkpoint_file(), weights_only=True)
    assert checkpoint["iteration"] == 2
    for name, value in trainer.detector.state_dict().items():
        assert torch.equal(checkpoint["model_training"][name], value)
    assert trainer.ema.updates == 3
    assert any(
        not torch.equal(checkpoint["model"][name], value)
        for name, value in checkpoint["model_training"].items()
    )


def test_resuming_keeps_the_seed_of_the_run(tmp_path):
    first = train(make_config(tmp_path, "SEED", -1, "SOLVER.MAX_ITER", 2))
    second = Trainer(make_config(tmp_path, "SEED", 77))
    second.resume_or_load(resume=True)
    assert second.seed == first.seed


def test_resuming_takes_rate_and_momentum_of_the_configuration(tmp_path):
    sgd = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.MAX_ITER", 2)
    train(make_config(tmp_path, *sgd))
    changed = ("SOLVER.BASE_LR", 0.0004, "SOLVER.MOMENTUM", 0.5)
    trainer = Trainer(make_config(tmp_path, *sgd, *changed))
    trainer.resume_or_load(resume=True)
    groups = trainer.optimizer.param_groups
    assert {(group["lr"], group["momentum"]) for group in groups} == {(0.0004, 0.5)}


def test_resuming_with_other_groups_of_parameters_is_refused(tmp_path):
    train(make_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.WEIGHT_DECAY_NORM", 1e-4))
    cfg = make_config(tmp_path, "SOLVER.WEIGHT_DECAY_NORM", 0.5)
    with pytest.raises(UserError, match="optimiser has other parameters"):
        Trainer(cfg).resume_or_load(resume=True)


def test_resuming_a_finished_run_evaluates_and_ends(tmp_path):
    options = ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", ("tiny_train",)]
    train(make_config(tmp_path, *options))
    trainer = train(make_config(tmp_path, *options), resume=True)
    assert trainer.start_iter == 2 and trainer.finished == 1
    assert "bbox/AP" in trainer.storage.latest()


def test_an_evaluation_of_a_run_that_has_ended_leaves_the_message_to_the_watch(
    tmp_path, monkeypatch
):
    class GaveWay(Exception):
        pass

    def fail(code: int, save: bool = True) -> str:
        raise GaveWay

    trainer = Trainer(make_config(tmp_path))
    monkeypatch.setattr(trainer.watch, "fail", fail)
    with pytest.raises(GaveWay):
        trainer._stop_for(EvaluationInterrupted())
