"""A run that is killed on N processes and resumed on M is the run that was never interrupted."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from tiny_run import NAMES, TWO_LEVELS, losses_of, make_config

from dynamic_detr.data.coco_json import register_json
from dynamic_detr.engine.launch import launch
from dynamic_detr.engine.trainer import Trainer

BATCH, AFTER = 12, 20  # images in a batch; steps that are compared after the change
TIMES = ("time", "data_time", "eta_seconds")


class _Killed(BaseException):
    """Ends a run within this process as SIGKILL would: nothing is saved."""


class _Kill(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            if comm.get_world_size() == 1:
                raise _Killed
            os.kill(os.getpid(), signal.SIGKILL)


def _part(cfg: CfgNode, folder: Path, resume: bool, kill: int) -> None:
    """What each process of a run does; only process 0 has the files."""
    register_json("tiny_train", folder / "data" / "boxes.json", folder / "data", NAMES)
    torch.set_num_threads(1)
    if not comm.is_main_process():
        absent = str(folder / f"of_process_{comm.get_rank()}")
        cfg.merge_from_list(["OUTPUT_DIR", absent, "MODEL.WEIGHTS", f"{absent}/weights.pth"])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([_Kill(kill)])
    trainer.train()
    if comm.is_main_process():
        result = {"losses": losses_of(trainer), "model": trainer.detector.state_dict()}
        torch.save(result, folder / "result.pth")


def _run(processes: int, cfg: CfgNode, folder: Path, resume: bool = False, kill: int = -1) -> None:
    threads = torch.get_num_threads()
    try:
        launch(_part, processes, on_gpu=False, args=(cfg, folder, resume, kill))
    except (_Killed, SystemExit) as end:
        assert isinstance(end, _Killed) or end.code == 128 + signal.SIGKILL
        assert kill >= 0
    finally:
        torch.set_num_threads(threads)


def _metrics(folder: Path) -> dict[str, float]:
    """The last line of numbers, but for times."""
    line = json.loads((folder / "output" / "metrics.json").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if name not in TIMES}


def _largest_deviation(
    folder: Path, before: int, after: int, kill: int, workers: int, ema: bool
) -> float:
    """Of the losses of a resumed run from those of a whole one, relative."""
    torch.manual_seed(0)
    weights = folder / "weights.pth"
    options = [
        *(*TWO_LEVELS, "SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.EMA.ENABLED", ema, "SOLVER.STEPS"),
        *((8,), "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", kill // 4 * 4 + AFTER),
        *("DATALOADER.NUM_WORKERS", workers, "MODEL.WEIGHTS", str(weights)),
    ]
    whole, parts = folder / "whole", folder / "parts"
    cfg = make_config(whole, *options)
    torch.save(Trainer.build_model(cfg).state_dict(), weights)
    _run(before, cfg, whole)
    expected = torch.load(whole / "result.pth")

    cfg = make_config(parts, *options)
    _run(before, cfg, parts, kill=kill)
    _run(after, cfg, parts, resume=True)
    found = torch.load(parts / "result.pth")
    assert list(found["losses"]) == list(expected["losses"])[-AFTER:]
    assert not list(folder.rglob("of_process_*/*.pth"))
    if before == after:
        assert found["losses"].items() <= expected["losses"].items()
        assert all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
        assert _metrics(parts) == _metrics(whole)
    else:
        assert _metrics(parts) == pytest.approx(_metrics(whole), rel=1e-4)
    return max(abs(found["losses"][i] / expected["losses"][i] - 1) for i in found["losses"])


@pytest.mark.parametrize(
    ("before", "after", "kill", "workers", "ema"), [(1, 2, 6, 0, True), (2, 1, 5, 2, False)]
)
def test_resumed_on_other_processes(tmp_path, before, after, kill, workers, ema):
    assert _largest_deviation(tmp_path, before, after, kill, workers, ema) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kill", [4, 7, 13])
@pytest.mark.parametrize(
    ("before", "after"), [*itertools.permutations((1, 2, 3), 2), (1, 1), (2, 2), (2, 4)]
)
def test_resumed_on_other_processes_in_every_way(tmp_path, before, after, kill, workers, ema):
    deviation = _largest_deviation(tmp_path, before, after, kill, workers, ema)
    print(f"{before} -> {after}, killed at {kill}, {workers} workers, EMA {ema}: {deviation:.1e}")
    assert deviation < 1e-5
