"""Times of each operator, of a baseline made of public operators, and of a lower bound: the plain
convolution with the same arithmetic, a copy of the same number of bytes, or SciPy's assignment."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dynamic_detr import Pyramid, add_dynamic_detr_config
from dynamic_detr.losses import HungarianMatcher, SetCosts
from dynamic_detr.ops import (
    FusionWeights,
    deform_conv2d,
    fuse_levels,
    ms_deform_attn,
    pyramid_roi_align,
)

from .baselines import (
    baseline_deform_conv2d,
    baseline_fusion,
    baseline_matching,
    baseline_ms_deform_attn,
    pool_levels,
)
from .products import dtypes_of
from .timing import time_in_turns

__all__ = [
    "attention_case",
    "attention_shapes",
    "deform_conv_case",
    "measure_operators",
    "timed_call",
]

CHANNELS = 256
STRIDES = (4, 8, 16, 32, 64)
QUERIES = 300
POOLING = (7, 2, 224.0)  # bins on each side, samples on each side of a bin, canonical size
HEADS, POINTS = 8, 4
GROUPS = 16
STAGES, IMAGES, OBJECTS, CLASSES = 6, 2, 20, 80

Function = Callable[..., Tensor | list[Tensor]]


@dataclass
class Case:
    """An operator, its arguments, and what it is compared with.

    Args:
        name: name in the table.
        tensors: arguments of the operator; the backward pass computes their gradients.
        ours: the operator.
        bound: name and function of the lower bound, and the arguments of this function.
        baseline: name and function of the baseline, called with `tensors`; None without one.
        differentiable: whether to time the backward pass too.
    """

    name: str
    tensors: tuple[Tensor, ...]
    ours: Function
    bound: tuple[str, Function, tuple[Tensor, ...]]
    baseline: tuple[str, Function] | None = None
    differentiable: bool = True


def measure_operators(args: argparse.Namespace, device: str) -> list[dict]:
    """Return a row for each operator, forward and forward + backward.

    Args:
        args: command line of benchmark.py.
        device: "cuda" or "cpu".

    Returns:
        Rows with "operator", "milliseconds" and "spread"; "bound" and "baseline", the names, or
        None; "share_of_bound" and "times_bound", the bound's time over the operator's and its
        inverse; "speedup" over the baseline, or None; "ran_in", the dtypes of all three.
    """
    dtype = getattr(torch, args.dtype)
    rows = []
    for build in (
        deform_conv_case,
        _grouped_deform_conv,
        _fuse_levels,
        _roi_align,
        attention_case,
        _matching,
    ):
        case = build(args.size, dtype, device)
        for backward in (False, True) if case.differentiable else (False,):
            rows.append(_row(case, backward, args, device))
    return rows


def _row(case: Case, backward: bool, args: argparse.Namespace, device: str) -> dict:
    calls = {"ours": timed_call(case.ours, case.tensors, backward)}
    calls["bound"] = timed_call(*case.bound[1:], backward)
    if case.baseline:
        calls["baseline"] = timed_call(case.baseline[1], case.tensors, backward)
    name = f"{case.name}, " + ("forward + backward" if backward else "forward")
    timings = time_in_turns(calls, device, args.repeats, args.budget, name)
    ours, bound = timings["ours"], timings["bound"]
    baseline = timings.get("baseline")
    ran_in = {}
    if args.dtype != "float32":  # some operators support float32 only, or accumulate in it
        ran_in = {kind: dtypes_of(call) for kind, call in calls.items()}
    return {
        "operator": name,
        "milliseconds": 1e3 * ours.median,
        "spread": ours.spread,
        "bound": case.bound[0],
        "share_of_bound": bound.median / ours.median,
        "times_bound": ours.median / bound.median,
        "baseline": case.baseline[0] if case.baseline else None,
        "speedup": baseline.median / ours.median if baseline else None,
        "ran_in": ran_in,
    }


def timed_call(
    function: Function, tensors: tuple[Tensor, ...], backward: bool
) -> Callable[[], object]:
    """Return a function without arguments that computes the result, or also all gradients.

    Args:
        function: function of the tensors; returns one tensor or a list.
        tensors: its arguments.
        backward: whether to compute their gradients.
    """
    if not backward:

        def forward() -> Tensor | list[Tensor]:
            with torch.no_grad():
                return function(*tensors)

        return forward

    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    with torch.no_grad():
        out = function(*tensors)
        upstream = [torch.ones_like(t) for t in ([out] if isinstance(out, Tensor) else out)]

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True)

    return both


def _map(height: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    values = torch.randn(1, height, width, CHANNELS, dtype=dtype, device=device)
    return values.permute(0, 3, 1, 2)  # channels-last


def _copy(elements: int, dtype: torch.dtype, device: str) -> tuple[Function, tuple[Tensor]]:
    """Return a function that reads and writes each element once, also in its backward pass."""
    return lambda numbers: numbers * 2, (torch.ones(elements, dtype=dtype, device=device),)


def deform_conv_case(
    size: tuple[int, int], dtype: torch.dtype, device: str, groups: int = 1
) -> Case:
    """Return the modulated 3×3 convolution of the finest level, with random offsets.

    Args:
        size: (height, width) of the image in pixels.
        dtype: dtype of the map and the weight.
        device: "cuda" or "cpu".
        groups: number of channel groups.
    """
    height, width = size[0] // STRIDES[0], size[1] // STRIDES[0]
    weight = 0.02 * torch.randn(CHANNELS, CHANNELS // groups, 3, 3, dtype=dtype, device=device)
    tensors = (
        _map(height, width, dtype, device),
        torch.randn(1, 18, height, width, device=device),
        torch.rand(1, 9, height, width, device=device),
        weight,
    )
    grouped = f", {groups} groups" if groups > 1 else ""

    def ours(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, groups)

    def baseline(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return baseline_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1)

    return Case(
        f"deformable 3×3, {CHANNELS} → {CHANNELS}{grouped}, {height} × {width}",
        tensors,
        ours,
        (
            "plain convolution",
            lambda x, weight: F.conv2d(x, weight, padding=1, groups=groups),
            (tensors[0], weight),
        ),
        ("torchvision", baseline),
    )


def _grouped_deform_conv(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Return the convolution of res3 in a ResNeXt-101 32x8d, at half the resolution."""
    return deform_conv_case((size[0] // 2, size[1] // 2), dtype, device, groups=32)


def _fuse_levels(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Return what the encoder computes after the convolutions, for its two finest levels."""
    height, width = size[0] // STRIDES[0], size[1] // STRIDES[0]
    half = (height + 1) // 2, (width + 1) // 2
    same = [_map(height, width, dtype, device), _map(*half, dtype, device)]
    tensors = (*same, _map(*half, dtype, device), _map(*half, dtype, device))
    sizes = [torch.tensor([size], device=device) for size in ((height, width), half)]
    weights = FusionWeights(
        *(torch.randn(3, CHANNELS, device=device) for _ in range(3)),
        *(0.01 * torch.randn(*s, device=device) for s in ((1, CHANNELS), (1,))),
        *(0.1 * torch.randn(*s, device=device) for s in ((64, CHANNELS), (64,))),
        *(0.1 * torch.randn(*s, device=device) for s in ((4 * CHANNELS, 64), (4 * CHANNELS,))),
    )

    def ours(first: Tensor, second: Tensor, finer: Tensor, coarser: Tensor) -> list[Tensor]:
        return fuse_levels([first, second], [finer], [coarser], sizes, weights, GROUPS)

    def baseline(first: Tensor, second: Tensor, finer: Tensor, coarser: Tensor) -> list[Tensor]:
        return [baseline_fusion(first, coarser), baseline_fusion(second, finer)]

    # A copy reads and writes each number; the operator reads 1 ¾ maps twice and writes 1 ¼.
    copied = int(2.375 * same[0].numel())
    return Case(
        f"norms, upsampling, mean and DyReLU of two levels, {height} × {width}",
        tensors,
        ours,
        ("copy of same bytes", *_copy(copied, dtype, device)),
        ("PyTorch operators", baseline),
    )


def _roi_align(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    maps = tuple(_map(size[0] // s, size[1] // s, dtype, device) for s in STRIDES)
    sizes = torch.tensor([size], device=device)
    limit = torch.tensor([size[1], size[0]] * 2, device=device)
    corners = torch.rand(1, QUERIES, 2, 2, device=device).sort(dim=2).values
    boxes = corners.flatten(2) * limit
    bins = POOLING[0] ** 2
    pooled = torch.float32 if dtype == torch.bfloat16 else dtype  # the pooler has no bfloat16

    def ours(*maps: Tensor) -> Tensor:
        pyramid = Pyramid(maps, STRIDES, sizes)
        table, shapes = pyramid.table(), pyramid.shapes
        return pyramid_roi_align(table, shapes, STRIDES, sizes, boxes, *POOLING)

    def baseline(*maps: Tensor) -> Tensor:
        levels = [m.to(pooled) for m in maps]
        return pool_levels(levels, STRIDES, boxes, *POOLING).to(maps[0].dtype)

    return Case(
        f"RoIAlign, {QUERIES} boxes, {len(STRIDES)} levels",
        maps,
        ours,
        ("copy of the result", *_copy(QUERIES * bins * CHANNELS, dtype, device)),
        ("Detectron2's ROIPooler", baseline),
    )


def attention_shapes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (height, width) of the levels in `attention_case`."""
    return [(size[0] // stride, size[1] // stride) for stride in STRIDES[1:]]


def attention_case(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Return multi-scale deformable attention as in an encoder: every position is a query.

    Args:
        size: (height, width) of the image in pixels.
        dtype: dtype of the values.
        device: "cuda" or "cpu".
    """
    shapes = attention_shapes(size)
    rows = sum(height * width for height, width in shapes)
    value = torch.randn(1, rows, HEADS, CHANNELS // HEADS, dtype=dtype, device=device)
    locations = torch.rand(1, rows, HEADS, len(shapes), POINTS, 2, device=device)
    weights = torch.rand(1, rows, HEADS, len(shapes) * POINTS, device=device).softmax(dim=-1)
    weights = weights.unflatten(-1, (len(shapes), POINTS))

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, shapes, locations, weights)

    def baseline(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return baseline_ms_deform_attn(value, shapes, locations, weights)

    elements = value.numel() + (locations.numel() + weights.numel()) * 4 // dtype.itemsize
    return Case(
        f"multi-scale deformable attention, {rows} queries, {len(shapes)} levels",
        (value, locations, weights),
        ours,
        ("copy of the arguments", *_copy(elements, dtype, device)),
        ("grid_sample per level", baseline),
    )


def _matching(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    logits = torch.randn(STAGES, IMAGES, QUERIES, CLASSES, device=device)
    boxes = torch.rand(STAGES, IMAGES, QUERIES, 4, device=device)
    labels = torch.randint(0, CLASSES, (IMAGES * OBJECTS,), device=device)
    objects = torch.rand(IMAGES * OBJECTS, 4, device=device)
    counts = [OBJECTS] * IMAGES
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    matcher = HungarianMatcher(SetCosts.from_config(cfg))
    costs = matcher.pair_costs(logits, boxes, labels, objects, counts).cpu()

    def ours(logits: Tensor, boxes: Tensor) -> Tensor:
        return matcher(logits, boxes, labels, objects, counts).wait()[0]

    def baseline(logits: Tensor, boxes: Tensor) -> Tensor:
        return baseline_matching(matcher, logits, boxes, labels, objects, counts)

    def solved(costs: Tensor) -> Tensor:
        for image in costs.split(counts):
            for stage in range(STAGES):
                linear_sum_assignment(image[:, stage].T)
        return costs

    return Case(
        f"matching, {STAGES} stages, {IMAGES} images, {QUERIES} queries, {OBJECTS} objects",
        (logits, boxes),
        ours,
        ("SciPy, given costs", solved, (costs,)),
        ("one stage and image at a time", baseline),
        differentiable=False,
    )
