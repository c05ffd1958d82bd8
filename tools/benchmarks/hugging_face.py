"""Inference times of DETR and Deformable DETR and of Hugging Face's classes, for the whole network
and for its transformer."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dynamic_detr.errors import UserError

from .models import build_detector
from .timing import time_in_turns

__all__ = ["measure_hugging_face"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def measure_hugging_face(args: argparse.Namespace, device: str) -> list[dict]:
    """Time both implementations of each system in float32, with random weights.

    Args:
        args: command line of benchmark.py.
        device: "cuda" or "cpu".

    Returns:
        Rows with "system"; "part", "whole" or "transformer"; "ours_s" and "theirs_s", seconds of
        one image.

    Raises:
        UserError: the package transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("the package transformers is missing: pip install transformers") from error
    stages = {"DETR": ["stage4"], "Deformable DETR": ["stage2", "stage3", "stage4"]}
    theirs = {
        "DETR": lambda resnet: transformers.DetrForObjectDetection(
            transformers.DetrConfig(backbone_config=resnet)
        ),
        "Deformable DETR": lambda resnet: transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(backbone_config=resnet)
        ),
    }
    configs = {
        "DETR": "DETR/detr_R_50.yaml",
        "Deformable DETR": "Deformable-DETR/deformable_detr_R_50.yaml",
    }
    image = torch.randn(1, 3, *args.size, device=device)
    rows = []
    for name, config in configs.items():
        ours = build_detector(str(CONFIGS / config), device).eval()
        peer = theirs[name](transformers.ResNetConfig(out_features=stages[name]))
        rows += _rows(name, ours, peer.eval().to(device), image, args, device)
    return rows


def _rows(
    name: str, ours: nn.Module, theirs: nn.Module, image: Tensor, args: argparse.Namespace, device
) -> list[dict]:
    sizes = torch.tensor([args.size], device=device)
    parts = {
        "ours": _Stopwatch((ours.encoder, ours.decoder), device),
        "theirs": _Stopwatch((theirs.model.encoder, theirs.model.decoder), device),
    }
    images = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        timings = time_in_turns(
            {
                "ours": parts["ours"].around(lambda: ours._network(images, sizes)),
                "theirs": parts["theirs"].around(lambda: theirs(pixel_values=image)),
            },
            device,
            args.repeats,
            args.budget,
            name,
        )
    whole = {side: timing.median for side, timing in timings.items()}
    transformer = {side: stopwatch.median() for side, stopwatch in parts.items()}
    return [
        {"system": name, "part": part, "ours_s": seconds["ours"], "theirs_s": seconds["theirs"]}
        for part, seconds in (("whole", whole), ("transformer", transformer))
    ]


class _Stopwatch:
    """Adds up the time of some modules during a call.

    Args:
        modules: modules that run one after the other.
        device: "cuda" or "cpu"; on "cuda" it synchronises before and after each module.
    """

    def __init__(self, modules: tuple[nn.Module, ...], device: str) -> None:
        self.device, self.totals = device, []
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._tick(-1))
            module.register_forward_hook(lambda *_: self._tick(1))

    def _tick(self, sign: int) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.totals[-1] += sign * time.perf_counter()

    def around(self, function: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            self.totals.append(0.0)
            return function()

        return call

    def median(self) -> float:
        """Return the median in seconds of all calls but the first one."""
        return statistics.median(self.totals[1:] or self.totals)
