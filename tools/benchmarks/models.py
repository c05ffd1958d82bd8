"""Times of whole detectors in one run: of any configurations and of Detectron2's detectors; of the
first detector also with the baseline operators, and its lower bound."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from dynamic_detr.files.config_file import find_config, read_config

from .baselines import baseline_operators
from .costs import config_products, count_gmac, count_parameters, padded_shape
from .products import PlainProducts, dtypes_of
from .timing import Timing, time_in_turns

__all__ = ["BASELINE", "BOUND", "build_detector", "measure_models", "profile_model"]

BASELINE = "baseline operators"
BOUND = "bound: backbone, plain products"
OBJECTS = 8  # in each training image
SMALL = (128, 160)  # (height, width) in pixels of the image that `dtypes` runs on
SHOWN = 12  # operations in a profile


def measure_models(args: argparse.Namespace, device: str) -> list[dict]:
    """Return a row for each detector, of one image, of a batch and of a training step.

    Args:
        args: command line of benchmark.py.
        device: "cuda" or "cpu".

    Returns:
        Rows with times in seconds and their ratios to the first detector ("..._to_first"), to its
        bound and to the first of `args.peer`, peak memory in GB, parameters in millions, GMAC by
        part and dtypes. A value is None where it was not measured.
    """
    runs = {Path(config).stem: _Run(config, args, device) for config in args.config_file}
    first = next(iter(runs))
    runs[BOUND] = _Bound(runs[first], args)
    if not args.no_naive:
        runs[BASELINE] = _Run(runs[first], args, device)
    runs |= {Path(config).stem: _Run(config, args, device) for config in args.peer}
    peer = Path(args.peer[0]).stem

    def timings(
        title: str, function: Callable[["_Run"], Callable], without: tuple[str, ...] = ()
    ) -> dict[str, Timing]:
        calls = {name: function(run) for name, run in runs.items() if name not in without}
        return time_in_turns(calls, device, args.repeats, args.budget, title)

    latency = timings("one image", lambda run: lambda: run.infer(1))
    # The baseline takes more than a minute for one image on a CPU.
    slow = (BASELINE,) if device == "cpu" else ()
    several = (*slow, BOUND)
    throughput = timings(f"{args.batch} images", lambda run: lambda: run.infer(args.batch), several)
    training = timings("training step", lambda run: lambda: run.train(args.train_batch), slow)
    rows = []
    for name, run in runs.items():
        batch, step = throughput.get(name), training.get(name)
        rows.append(
            {
                "model": name,
                "latency_s": latency[name].median,
                "latency_spread": latency[name].spread,
                "latency_to_first": latency[name].median / latency[first].median,
                "latency_to_bound": latency[name].median / latency[BOUND].median,
                "latency_to_peer": latency[name].median / latency[peer].median,
                "images_per_s": batch and args.batch / batch.median,
                "train_step_s": step and step.median,
                "train_step_to_first": step and step.median / training[first].median,
                "train_step_to_bound": step and step.median / training[BOUND].median,
                "train_step_to_peer": step and step.median / training[peer].median,
                "train_peak_gb": step and step.peak_bytes and step.peak_bytes / 1e9,
                "parameters_m": None if name == BOUND else count_parameters(run.model),
                "gmac": run.gmac(),
                "ran_in": run.dtypes(),
            }
        )
    return rows


def profile_model(args: argparse.Namespace, device: str) -> dict[str, list[dict]]:
    """Profile inference and a training step of the first detector.

    Args:
        args: command line of benchmark.py.
        device: "cuda" or "cpu".

    Returns:
        The most expensive operations, with their share of the time of all operations in [0, 1] and
        their number of calls.
    """
    run = _Run(args.config_file[0], args, device)
    cuda = device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    profiles = {}
    for name, call in (
        ("one image", lambda: run.infer(1)),
        (f"training step, {args.train_batch} images", lambda: run.train(args.train_batch)),
    ):
        call()  # warm up
        with torch.profiler.profile(activities=[activity]) as profiler:
            call()
        time = "self_device_time_total" if cuda else "self_cpu_time_total"
        operations = sorted(profiler.key_averages(), key=lambda o: -getattr(o, time))
        total = sum(getattr(o, time) for o in operations)
        profiles[name] = [
            {"operation": o.key, "share": getattr(o, time) / total, "calls": o.count}
            for o in operations[:SHOWN]
        ]
    return profiles


class _Run:
    """A detector with random weights, which do not change any shape.

    Args:
        source: configuration file; or another run, whose detector gets the baseline operators.
        args: command line of benchmark.py.
        device: "cuda" or "cpu".
    """

    def __init__(self, source: "str | _Run", args: argparse.Namespace, device: str) -> None:
        self.operators = baseline_operators if isinstance(source, _Run) else nullcontext
        self.size, self.device, self.dtype = args.size, device, getattr(torch, args.dtype)
        self.model = source.model if isinstance(source, _Run) else build_detector(source, device)
        self.image = torch.randint(0, 256, (3, *args.size), dtype=torch.uint8)
        corners = torch.rand(OBJECTS, 2, 2).sort(dim=1).values.flatten(1)
        self.instances = Instances(
            args.size,
            gt_boxes=Boxes(corners * torch.tensor([args.size[1], args.size[0]] * 2)),
            gt_classes=torch.zeros(OBJECTS, dtype=torch.int64),
        )

    @contextmanager
    def _settings(self) -> Iterator[None]:
        half = self.dtype != torch.float32
        with self.operators(), torch.autocast(self.device, self.dtype, enabled=half):
            yield

    def infer(self, batch: int) -> object:
        return self._infer(self.image, batch)

    def _infer(self, image: Tensor, batch: int) -> object:
        height, width = image.shape[1:]
        with torch.no_grad(), self._settings():
            return self.model.eval()([{"image": image, "height": height, "width": width}] * batch)

    def train(self, batch: int) -> None:
        """Run forward and backward, without the optimiser."""
        with EventStorage(), self._settings():  # Detectron2's detectors need the storage
            inputs = [{"image": self.image, "instances": self.instances}] * batch
            loss = sum(self.model.train()(inputs).values())
        loss.backward()
        self.model.zero_grad()

    def gmac(self) -> dict[str, float] | None:
        """Return the GMAC of one image by part; None for operators that PyTorch cannot count."""
        if self.operators is baseline_operators:
            return None
        return count_gmac(self.model, lambda: self.infer(1))

    def dtypes(self) -> str:
        """Return the dtypes of inference, as `dtypes_of` does; they do not depend on the size."""
        image = self.image[:, : SMALL[0], : SMALL[1]]
        return dtypes_of(lambda: self._infer(image, 1))


class _Bound(_Run):
    """Lower bound of a detector: its backbone, and plain products of the sizes of its others."""

    def __init__(self, run: _Run, args: argparse.Namespace) -> None:
        self.__dict__.update(vars(run))
        self.products = {
            batch: PlainProducts(
                config_products(args.config_file[0], args.size, batch), self.dtype, self.device
            )
            for batch in {1, args.train_batch}
        }

    def infer(self, batch: int) -> None:
        self.model.eval()
        with torch.no_grad():
            self._features(batch)
        self.products[batch].forward()

    def train(self, batch: int) -> None:
        self.model.train()
        sum(feature.sum() for feature in self._features(batch)).backward()
        self.model.zero_grad()
        self.products[batch].forward_and_backward()

    def _features(self, batch: int) -> list[Tensor]:
        images = torch.randn(padded_shape(self.model, self.size, batch), device=self.device)
        with self._settings():
            return list(self.model.backbone(images).values())

    def gmac(self) -> None:
        """Return None: the numbers are those of the detector."""

    def dtypes(self) -> str:
        return dtypes_of(lambda: self.infer(1))


def build_detector(config_file: str, device: str) -> nn.Module:
    """Build the detector of a configuration, with random weights."""
    cfg = read_config(find_config(config_file), [])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device
    return build_model(cfg)
