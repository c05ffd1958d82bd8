"""How fast the trained detectors are: all in one process, in turns, so that whatever else the
machine does falls on all of them alike."""

from collections.abc import Callable

import torch
from benchmarks.timing import Timing, time_in_turns
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from dynamic_detr.data.loader import build_test_loader, build_train_loader
from dynamic_detr.engine.optimizer import build_optimizer
from dynamic_detr.engine.step import amp_dtype
from dynamic_detr.inference.building import build_with_weights

__all__ = ["measure_speed"]

IMAGES = 4  # of the validation set, seen again and again
BATCHES = 1


def measure_speed(
    configs: dict[str, CfgNode], rounds: int = 7, budget: float = 30
) -> dict[str, dict[str, float]]:
    """Times inference on single images and whole training steps (forward, backward, optimiser).

    Args:
        configs: of each detector, with its trained weights and its data sets registered.
        rounds: of turns.
        budget: seconds for each detector and each of the two, after which it is left out of turns.

    Returns:
        For each detector "inference_ms" of an image, "step_s" of a batch, and the spread of both:
        half the interquartile range as a share of the median; "size", (height, width) in pixels of
        the first image.
    """
    runs = {name: _Timed(cfg) for name, cfg in configs.items()}
    device = "cuda" if next(iter(configs.values())).MODEL.DEVICE.startswith("cuda") else "cpu"

    def turns(title: str, call: Callable[["_Timed"], Callable]) -> dict[str, Timing]:
        calls = {name: call(run) for name, run in runs.items()}
        return time_in_turns(calls, device, rounds, budget, title)

    inference = turns("inference", lambda run: run.infer)
    steps = turns("training step", lambda run: run.train)
    return {
        name: {
            "inference_ms": 1000 * inference[name].median / IMAGES,
            "inference_spread": inference[name].spread,
            "step_s": steps[name].median / BATCHES,
            "step_spread": steps[name].spread,
            "size": tuple(runs[name].images[0][0]["image"].shape[-2:]),
        }
        for name in runs
    }


class _Timed:
    """A detector with pictures that are read already."""

    def __init__(self, cfg: CfgNode) -> None:
        self.model: nn.Module = build_with_weights(cfg)[0]
        self.optimizer = build_optimizer(cfg, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # boxes, and so the time they take, stay those of the trained one
        solver = cfg.SOLVER
        device = next(self.model.parameters()).device
        self.dtype = amp_dtype(solver.AMP.ENABLED, solver.AMP.DTYPE, device.type)
        self.device = device.type
        test, train = build_test_loader(cfg, cfg.DATASETS.TEST[0]), build_train_loader(cfg, seed=1)
        self.images = [batch for batch, _ in zip(test, range(IMAGES), strict=False)]
        self.batches = [batch for batch, _ in zip(train, range(BATCHES), strict=False)]

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        for image in self.images:
            self.model(image)

    def train(self) -> None:
        self.model.train()
        for batch in self.batches:
            enabled = self.dtype is not None
            with EventStorage(), torch.autocast(self.device, self.dtype, enabled=enabled):
                loss = sum(self.model(batch).values())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
