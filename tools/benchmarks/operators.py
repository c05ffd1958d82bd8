"""Each operator beside the usual one, and beside what bounds it: the plain convolution or matrix
product with as much arithmetic, or a copy of as many bytes."""

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
    dynamic_conv,
    fuse_levels,
    ms_deform_attn,
    pyramid_roi_align,
)

from .products import dtypes_of
from .timing import time_in_turns
from .usual import (
    pool_levels,
    usual_deform_conv2d,
    usual_fusion,
    usual_matching,
    usual_ms_deform_attn,
)

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
DYNAMIC_DIM = 64
POOLING = (7, 2, 224.0)  # bins on each side, samples on each side of a bin, canonical size
HEADS, POINTS = 8, 4
GROUPS = 16
STAGES, IMAGES, OBJECTS, CLASSES = 6, 2, 20, 80

Function = Callable[..., Tensor | list[Tensor]]


@dataclass
class Case:
    """An operator with its arguments.

    Args:
        name: what it is.
        tensors: arguments that get gradients in the backward pass.
        ours: the operator, of these tensors.
        bound: name of what bounds it, function, and the function's tensors.
        usual: name of what it is compared to, and function.
        differentiable: whether there is a backward pass to measure.
    """

    name: str
    tensors: tuple[Tensor, ...]
    ours: Function
    bound: tuple[str, Function, tuple[Tensor, ...]]
    usual: tuple[str, Function] | None = None
    differentiable: bool = True


def measure_operators(args: argparse.Namespace, device: str) -> list[dict]:
    """A row for each operator and pass."""
    dtype = getattr(torch, args.dtype)
    rows = []
    for build in (
        deform_conv_case,
        _grouped_deform_conv,
        _fuse_levels,
        _roi_align,
        _dynamic_conv,
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
    if case.usual:
        calls["usual"] = timed_call(case.usual[1], case.tensors, backward)
    name = f"{case.name}, " + ("forward + backward" if backward else "forward")
    timings = time_in_turns(calls, device, args.repeats, args.budget, name)
    ours, bound = timings["ours"], timings["bound"]
    usual = timings.get("usual")
    ran_in = {}
    if args.dtype != "float32":  # some have no other dtype, or sum in it
        ran_in = {kind: dtypes_of(call) for kind, call in calls.items()}
    return {
        "operator": name,
        "milliseconds": 1e3 * ours.median,
        "spread": ours.spread,
        "bound": case.bound[0],
        "share_of_bound": bound.median / ours.median,
        "times_bound": ours.median / bound.median,
        "usual": case.usual[0] if case.usual else None,
        "faster_than_usual": usual.median / ours.median if usual else None,
        "ran_in": ran_in,
    }


def timed_call(
    function: Function, tensors: tuple[Tensor, ...], backward: bool
) -> Callable[[], object]:
    """A function without arguments: forward, or with `backward` all gradients as well."""
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
    """A read and a write of as many numbers, and once more in the backward pass."""
    return lambda numbers: numbers * 2, (torch.ones(elements, dtype=dtype, device=device),)


def deform_conv_case(
    size: tuple[int, int], dtype: torch.dtype, device: str, groups: int = 1
) -> Case:
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

    def usual(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return usual_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1)

    return Case(
        f"deformable 3×3, {CHANNELS} → {CHANNELS}{grouped}, {height} × {width}",
        tensors,
        ours,
        (
            "plain convolution",
            lambda x, weight: F.conv2d(x, weight, padding=1, groups=groups),
            (tensors[0], weight),
        ),
        ("torchvision", usual),
    )


def _grouped_deform_conv(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """As res3 of a ResNeXt-101 32x8d, at half of the resolution."""
    return deform_conv_case((size[0] // 2, size[1] // 2), dtype, device, groups=32)


def _fuse_levels(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """What the encoder does with the maps of its two finest levels after the convolutions."""
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

    def usual(first: Tensor, second: Tensor, finer: Tensor, coarser: Tensor) -> list[Tensor]:
        return [usual_fusion(first, coarser), usual_fusion(second, finer)]

    # two trips through memory for each copied number: 1 ¾ maps read twice, 1 ¼ written
    copied = int(2.375 * same[0].numel())
    return Case(
        f"norms, upsampling, mean and DyReLU of two levels, {height} × {width}",
        tensors,
        ours,
        ("copy of as many bytes", *_copy(copied, dtype, device)),
        ("PyTorch, one by one", usual),
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

    def usual(*maps: Tensor) -> Tensor:
        levels = [m.to(pooled) for m in maps]
        return pool_levels(levels, STRIDES, boxes, *POOLING).to(maps[0].dtype)

    return Case(
        f"RoIAlign, {QUERIES} boxes, {len(STRIDES)} levels",
        maps,
        ours,
        ("copy of the result", *_copy(QUERIES * bins * CHANNELS, dtype, device)),
        ("Detectron2's ROIPooler", usual),
    )


def _dynamic_conv(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    positions = POOLING[0] ** 2
    regions = torch.randn(QUERIES, positions, CHANNELS, dtype=dtype, device=device)
    filters = torch.randn(QUERIES, CHANNELS, DYNAMIC_DIM, dtype=dtype, device=device)
    return Case(
        f"dynamic convolution, {QUERIES} queries, {CHANNELS} → {DYNAMIC_DIM}",
        (regions, filters),
        dynamic_conv,
        ("matrix product", torch.bmm, (regions, filters)),
    )


def attention_shapes(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(size[0] // stride, size[1] // stride) for stride in STRIDES[1:]]


def attention_case(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    shapes = attention_shapes(size)
    rows = sum(height * width for height, width in shapes)
    value = torch.randn(1, rows, HEADS, CHANNELS // HEADS, dtype=dtype, device=device)
    locations = torch.rand(1, rows, HEADS, len(shapes), POINTS, 2, device=device)
    weights = torch.rand(1, rows, HEADS, len(shapes) * POINTS, device=device).softmax(dim=-1)
    weights = weights.unflatten(-1, (len(shapes), POINTS))

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, shapes, locations, weights)

    def usual(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return usual_ms_deform_attn(value, shapes, locations, weights)

    elements = value.numel() + (locations.numel() + weights.numel()) * 4 // dtype.itemsize
    return Case(
        f"multi-scale deformable attention, {rows} queries, {len(shapes)} levels",
        (value, locations, weights),
        ours,
        ("copy of the arguments", *_copy(elements, dtype, device)),
        ("grid_sample of each level", usual),
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

    def usual(logits: Tensor, boxes: Tensor) -> Tensor:
        return usual_matching(matcher, logits, boxes, labels, objects, counts)

    def solved(costs: Tensor) -> Tensor:
        for image in costs.split(counts):
            for stage in range(STAGES):
                linear_sum_assignment(image[:, stage].T)
        return costs

    return Case(
        f"matching, {STAGES} stages, {IMAGES} images, {QUERIES} queries, {OBJECTS} objects",
        (logits, boxes),
        ours,
        ("SciPy, costs at hand", solved, (costs,)),
        ("each stage and image on its own", usual),
        differentiable=False,
    )
