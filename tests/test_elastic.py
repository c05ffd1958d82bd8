"""A run that is stopped on N processes and resumed on M equals an uninterrupted one."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from tiny_run import NAMES, TWO_LEVELS, losses_of, make_config, train
from torch import nn

from dynamic_detr.cli.launch import launch
from dynamic_detr.data.coco_json import register_json
from dynamic_detr.engine.checkpoint import SafeCheckpointer
from dynamic_detr.engine.sharing import from_main_process
from dynamic_detr.engine.trainer import Trainer
from dynamic_detr.errors import UserError

BATCH, LAST = 6, 28  # images in a batch; steps
TIMES = ("time", "data_time", "eta_seconds")


def _part(cfg: CfgNode, folder: Path, resume: bool) -> None:
    """Train in one process of a run; only process 0 has the files."""
    register_json("tiny_train", folder / "data" / "boxes.json", folder / "data", NAMES)
    torch.set_num_threads(1)
    if not comm.is_main_process():
        absent = str(folder / f"of_process_{comm.get_rank()}")
        cfg.merge_from_list(["OUTPUT_DIR", absent, "MODEL.WEIGHTS", f"{absent}/weights.pth"])
    trainer = train(cfg, resume)
    if comm.is_main_process():
        result = {"losses": losses_of(trainer), "model": trainer.detector.state_dict()}
        torch.save(result, folder / "result.pth")


def _run(folder: Path, processes: int, workers: int, ema: bool, resume: bool = False) -> dict:
    """Train in a folder; losses, weights, and the last line of metrics but for times."""
    weights = folder / "weights.pth"
    # AdamW divides by the size of the gradient, and so also amplifies what is rounding alone.
    options = [
        *("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e-4),
        *(*TWO_LEVELS, "SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.STEPS", (20,), "SOLVER.EMA.ENABLED"),
        *(ema, "SOLVER.MAX_ITER", LAST, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.KEEP_CHECKPOINTS"),
        *(0, "DATALOADER.NUM_WORKERS", workers, "MODEL.WEIGHTS", str(weights)),
    ]
    cfg, threads = make_config(folder, *options), torch.get_num_threads()
    torch.manual_seed(0)
    torch.save(Trainer.build_model(cfg).state_dict(), weights)
    launch(_part, processes, on_gpu=False, args=(cfg, folder, resume))
    torch.set_num_threads(threads)
    assert not list(folder.rglob("of_process_*"))
    line = json.loads((folder / "output" / "metrics.json").read_text().splitlines()[-1])
    metrics = {name: value for name, value in line.items() if name not in TIMES}
    return {**torch.load(folder / "result.pth"), "metrics": metrics}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, and its folder; one for each number of processes."""

    @functools.cache
    def run(processes: int, ema: bool) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("whole")
        return folder, _run(folder, processes, 0, ema)

    return run


def _largest_deviation(
    whole, folder: Path, before: int, after: int, start: int, workers: int, ema: bool
) -> float:
    """Of the losses of a run that is resumed at a step from those of a whole one, relative."""
    (folder / "output").mkdir()
    other, expected = whole(before, ema)
    for done in range(4, start + 1, 4):  # what a kill soon after that step leaves
        shutil.copy(other / "output" / f"model_{done - 1:07d}.pth", folder / "output")
    found = _run(folder, after, workers, ema, resume=True)
    assert list(found["losses"]) == list(range(start, LAST)) and LAST - start >= 20
    if before == after:
        assert found["losses"].items() <= expected["losses"].items()
        assert all(torch.equal(found["model"][k], v) for k, v in expected["model"].items())
        assert found["metrics"] == expected["metrics"]
    else:
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    return max(abs(found["losses"][i] / expected["losses"][i] - 1) for i in found["losses"])


def test_resumed_on_another_number_of_processes(whole, tmp_path):
    found = _largest_deviation(whole, tmp_path, before=1, after=2, start=8, workers=1, ema=True)
    assert found < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("workers", "ema"), [(0, False), (2, True)])
@pytest.mark.parametrize("start", [4, 8])
@pytest.mark.parametrize(
    ("before", "after"), [*itertools.permutations((1, 2, 3), 2), (1, 1), (2, 2)]
)
def test_every_change_of_processes(whole, tmp_path, before, after, start, workers, ema):
    deviation = _largest_deviation(whole, tmp_path, before, after, start, workers, ema)
    print(f"{before} -> {after} at {start}, {workers} workers, EMA {ema}: {deviation:.1e}")
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
        first["told"], ("sparse", "absent.pth do not exist", "no checkpoint of the"), strict=True
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
