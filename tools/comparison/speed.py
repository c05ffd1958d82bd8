"""Times of the trained detectors, measured in turns in one process, so that other load slows all
alike."""

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

IMAGES = 4  # of the validation set, in every call


def measure_speed(
    configs: dict[str, CfgNode], rounds: int = 7, budget: float = 30
) -> dict[str, dict[str, float]]:
    """Time inference on single images and training steps (forward, backward, optimiser).

    Args:
        configs: configurations by name of the detector, with trained weights and registered
            datasets.
        rounds: number of measured rounds.
        budget: seconds for each detector and each kind of call, as in `time_in_turns`.

    Returns:
        For each detector, "inference_ms" per image and "step_s" per batch; "inference_spread" and
        "step_spread", half the interquartile range over the median; "size", (height, width) of the
        first image in pixels.
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
            "inference_ms": 1000 * inference[name].median / len(runs[name].images),
            "inference_spread": inference[name].spread,
            "step_s": steps[name].median,
            "step_spread": steps[name].spread,
            "size": tuple(runs[name].images[0][0]["image"].shape[-2:]),
        }
        for name in runs
    }


class _Timed:
    """A detector with images that are already in memory."""

    def __init__(self, cfg: CfgNode) -> None:
        self.model: nn.Module = build_with_weights(cfg)[0]
        self.optimizer = build_optimizer(cfg, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # keeps the trained weights, on whose boxes the time depends
        solver = cfg.SOLVER
        device = next(self.model.parameters()).device
        self.dtype = amp_dtype(solver.AMP.ENABLED, solver.AMP.DTYPE, device.type)
        self.device = device.type
        test, train = build_test_loader(cfg, cfg.DATASETS.TEST[0]), build_train_loader(cfg, seed=1)
        self.images = [batch for batch, _ in zip(test, range(IMAGES), strict=False)]
        self.batch = next(iter(train))

    @torch.no_grad()
    def infer(self) -> None:
        self.model.eval()
        for image in self.images:
            self.model(image)

    def train(self) -> None:
        self.model.train()
        enabled = self.dtype is not None
        with EventStorage(), torch.autocast(self.device, self.dtype, enabled=enabled):
            loss = sum(self.model(self.batch).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
