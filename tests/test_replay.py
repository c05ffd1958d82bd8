"""A diverged step is saved, and its replay names the module that caused it."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from tiny_run import make_config
from torch import nn

from dynamic_detr.engine.failed_step import FailedStep, save_failed_step
from dynamic_detr.engine.replay import replay
from dynamic_detr.engine.step import NonFiniteStep, seed_step
from dynamic_detr.engine.stopping import TrainingStopped
from dynamic_detr.engine.trainer import Trainer
from tools import replay_step


def _diverge(folder: Path, monkeypatch, poison) -> tuple[Trainer, str, dict]:
    """Train with ``poison`` before the third step; return the message and the losses."""
    cfg = make_config(folder, "MODEL.DYNAMIC_DECODER.DROPOUT", 0.1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    step, losses = trainer._trainer.run_step, {}

    def poisoned() -> None:
        if trainer.iter == 2:
            with torch.no_grad():
                poison(trainer.detector)
        try:
            step()
        except NonFiniteStep as error:
            losses.update(error.losses)
            raise

    monkeypatch.setattr(trainer._trainer, "run_step", poisoned)
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    assert stop.value.code == 3
    return trainer, stop.value.message, losses


def test_a_diverged_step_is_replayed(tmp_path, monkeypatch, capsys):
    def poison(detector: nn.Module) -> None:
        for layer in (0, 3):  # finite weights with an infinite product
            detector.decoder.stages[1].ffn[layer].weight.fill_(1e25)

    trainer, message, losses = _diverge(tmp_path, monkeypatch, poison)
    folder = tmp_path / "output" / "failed_step"
    assert f"; python tools/replay_step.py {folder} runs the step again" in message
    capsys.readouterr()
    assert replay_step.main([str(folder)]) == 0
    threads, first, second = capsys.readouterr().out.splitlines()
    assert threads.startswith("threads: ")
    assert first.startswith("iteration 2, process 0 of 1: ") and first.count(".png") == 2
    assert second.strip().startswith("decoder.stages.1.ffn.3 (Linear): ")
    assert second.endswith("its input is finite")

    step = FailedStep.load(folder)
    (batch,) = step.batches(folder).values()
    for ours, theirs in zip(batch, trainer._trainer.batch, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        boxes = ours["instances"].gt_boxes.tensor
        assert torch.equal(boxes, theirs["instances"].gt_boxes.tensor)
    model = build_model(step.cfg()).train()
    model.load_state_dict(step.model)
    seed_step(step.seed, step.iteration, 0)  # with dropout: the same losses, to the last bit
    with EventStorage(2):
        again = model(batch)
    assert {n: v for n, v in losses.items() if math.isfinite(v)} != {}
    for name, value in losses.items():
        assert again[name].item() == value or math.isnan(value) or math.isinf(value)


class Toy(nn.Module):
    """Sequence of modules that ends in a loss."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(2, 2), *parts)
        nn.init.zeros_(self.parts[0].weight)
        nn.init.zeros_(self.parts[0].bias)

    def forward(self, batch: list[dict]) -> dict:
        return {"loss_toy": self.parts(torch.ones(3, 2)).sum()}


class Do(nn.Module):
    """Module that applies a function, to the output of an inner module if there is one."""

    def __init__(self, function, part: nn.Module | None = None):
        super().__init__()
        self.function = function
        self.part = part or nn.Identity()

    def forward(self, x):
        return self.part(self.function(x))


class Big(nn.Module):
    def forward(self, x):
        return x * torch.inf


@pytest.mark.parametrize(
    ("parts", "place", "what"),
    [
        ([Do(torch.log)], "parts.1 (Do)", "6 of the 6 numbers that it passes"),
        (
            [nn.ReLU(), Do(lambda x: x / 0, nn.ReLU())],
            "parts.2 (Do)",
            "passes to parts.2.part (ReLU",
        ),
        ([Do(torch.sqrt), nn.ReLU()], "parts.1 (Do)", "SqrtBackward0"),
        ([Do(torch.sqrt), Do(lambda x: (x + 1).relu_())], "parts.1 (Do)", "SqrtBackward0"),
        ([nn.ConvTranspose1d(3, 3, 1), Big()], "parts.2 (Big)", "6 numbers of its output"),
        ([nn.Sigmoid(), Do(lambda x: (x - x) ** 0.5)], "parts.2 (Do)", "PowBackward0"),
        ([Do(lambda x: x.exp() * 1e38, nn.Softplus())], "loss_toy", "the loss is not finite"),
        ([Do(lambda x: x * 1e30)], "parts.0.weight", "too large for a norm: 3e+30"),
        ([Do(lambda x: x * 2)], None, ""),
    ],
)
def test_the_first_module_is_named(parts, place, what):
    finding = replay(Toy(*parts).train(), [])
    assert (finding is None) if place is None else (finding.place == place)
    assert what in str(finding)


def test_weights_that_are_not_finite_are_named():
    model = Toy()
    model.parts[0].bias.data[0] = torch.inf
    assert str(replay(model, [])).startswith("parts.0.bias: the weight is not finite already")


def test_every_process_has_a_file_and_old_ones_are_left_out(tmp_path, capsys):
    step = FailedStep(7, 1, 3, "", 1.0, "VERSION: 2", {})
    instances = Instances((4, 4), gt_boxes=Boxes(torch.ones(1, 4)))
    instances.gt_masks = PolygonMasks([[[0.0, 0, 1, 0, 1, 1]]])
    save_failed_step(tmp_path, step, [{"file_name": "a"}], 7, 0)
    save_failed_step(tmp_path, None, [{"instances": instances}], 7, 1)
    save_failed_step(tmp_path, None, [{"file_name": "old"}], 6, 2)
    batches = FailedStep.load(tmp_path).batches(tmp_path)
    assert list(batches) == [0, 1] and batches[0] == [{"file_name": "a"}]
    assert batches[1][0]["instances"].gt_masks.polygons[0][0].tolist() == [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"text", "is not a valid checkpoint")]
)
def test_what_is_no_failed_step_is_one_line(tmp_path, capsys, content, message):
    if content:
        (tmp_path / "step.pth").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        replay_step.main([str(tmp_path)])
    assert stop.value.code == 2
    line = f"replay_step.py: error: {tmp_path}/step.pth {message}"
    assert capsys.readouterr().err.startswith(line)
