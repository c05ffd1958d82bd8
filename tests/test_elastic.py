"""A run that is killed on N processes and resumed on M is the run that was never interrupted."""

import functools
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
from torch import nn

from dynamic_detr.data.coco_json import register_json
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.launch import launch
from dynamic_detr.engine.sharing import from_main_process
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError

BATCH, PERIOD, LAST = 12, 4, 28  # images in a batch; checkpoints every 4 steps, of 28
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


def _config(folder: Path, workers: int, ema: bool) -> CfgNode:
    torch.manual_seed(0)
    options = [
        *(*TWO_LEVELS, "SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.STEPS", (20,), "SOLVER.EMA.ENABLED"),
        *(ema, "SOLVER.MAX_ITER", LAST, "SOLVER.CHECKPOINT_PERIOD", PERIOD),
        *("DATALOADER.NUM_WORKERS", workers, "MODEL.WEIGHTS", str(folder / "weights.pth")),
    ]
    cfg = make_config(folder, *options)
    torch.save(Trainer.build_model(cfg).state_dict(), cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never interrupted; one for each number of processes."""

    @functools.cache
    def run(processes: int, ema: bool) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        _run(processes, _config(folder, 0, ema), folder)
        return folder

    return run


def _largest_deviation(
    whole, folder: Path, before: int, after: int, kill: int, workers: int, ema: bool
) -> float:
    """Of the losses of a resumed run from those of a whole one, relative."""
    _run(before, _config(folder, workers, ema), folder, kill=kill)
    _run(after, _config(folder, workers, ema), folder, resume=True)
    other = whole(before if before == after else 1, ema)
    found, expected = (torch.load(each / "result.pth") for each in (folder, other))
    assert list(found["losses"]) == list(range(kill - kill % PERIOD, LAST))
    assert not list(folder.rglob("of_process_*"))
    if before == after:
        assert found["losses"].items() <= expected["losses"].items()
        assert all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
        assert _metrics(folder) == _metrics(other)
    else:
        assert _metrics(folder) == pytest.approx(_metrics(other), rel=1e-4)
    return max(abs(found["losses"][i] / expected["losses"][i] - 1) for i in found["losses"])


@pytest.mark.parametrize(
    ("before", "after", "kill", "workers", "ema"), [(1, 2, 6, 0, True), (2, 1, 5, 2, True)]
)
def test_resumed_on_other_processes(whole, tmp_path, before, after, kill, workers, ema):
    assert _largest_deviation(whole, tmp_path, before, after, kill, workers, ema) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("kill", "workers", "ema"), [(4, 0, False), (7, 2, True), (10, 2, False), (11, 0, True)]
)
@pytest.mark.parametrize(
    ("before", "after"), [*itertools.permutations((1, 2, 3), 2), (1, 1), (2, 2)]
)
def test_every_change_of_processes(whole, tmp_path, before, after, kill, workers, ema):
    deviation = _largest_deviation(whole, tmp_path, before, after, kill, workers, ema)
    print(f"{before} -> {after}, killed at {kill}, {workers} workers, EMA {ema}: {deviation:.1e}")
    assert deviation < 1e-5


CONTENT = {
    "tensors": [torch.arange(6.0).reshape(2, 3).t(), torch.zeros(0, 2), torch.tensor(True)],
    "rest": ({"a": 1}, "b", None, torch.full((2, 1), 1.5, dtype=torch.bfloat16)),
}


def _share(folder: Path) -> None:
    """In each of two processes: what process 0 reads, and every error of its reading."""
    main = comm.is_main_process()
    received = from_main_process(lambda: CONTENT if main else None)
    told = []
    for attempt in (
        lambda: from_main_process(lambda: [torch.zeros(2).to_sparse()]),
        lambda: SafeCheckpointer(nn.Linear(1, 1)).load_for_all("absent.pth"),
        lambda: SafeCheckpointer(nn.Linear(1, 1), str(folder / "broken")).resume(),
    ):
        try:
            attempt()
        except UserError as error:
            told.append(str(error))
    model = nn.Linear(2, 2)
    SafeCheckpointer(model).load_for_all(str(folder / "good.pth"))
    nothing = SafeCheckpointer(model, str(folder / "none")).resume()
    content = {"received": received, "told": told, "weight": model.weight, "nothing": nothing}
    torch.save(content, folder / f"{comm.get_rank()}.pth")


def test_what_process_0_reads_all_receive(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "good.pth")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_final.pth").write_text("no checkpoint")
    launch(_share, 2, on_gpu=False, args=(tmp_path,))
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert first["told"] == second["told"] and first["nothing"] is second["nothing"] is None
    for text, part in zip(
        first["told"], ("sparse", "absent.pth do not exist", "none of the 1"), strict=True
    ):
        assert part in text
    assert torch.equal(first["weight"], second["weight"])
    for sent, got in zip(
        CONTENT["tensors"] + [CONTENT["rest"][3]],
        second["received"]["tensors"] + [second["received"]["rest"][3]],
        strict=True,
    ):
        assert torch.equal(sent, got) and sent.dtype is got.dtype and sent.stride() == got.stride()
    assert second["received"]["rest"][:3] == CONTENT["rest"][:3]
