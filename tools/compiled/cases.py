"""Calls of each operator for an 800 × 1344 image, and the work of each kernel.

Deformable convolution and fusion run at the finest level (P2, 200 × 336), RoIAlign and attention on
all levels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynamic_detr.ops.kernels import deform_conv, fuse_levels, ms_deform_attn, roi_align

__all__ = ["CASES", "Case", "Work"]

CHANNELS = 256
SHAPES = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]  # P2 to P6
STRIDES = (4, 8, 16, 32, 64)
TAPS = 9
BOXES, BINS, SAMPLES = 300, 7, 2
HEADS, POINTS = 8, 4
CORNERS = 4


@dataclass(frozen=True)
class Work:
    """Work of a kernel besides reading or writing each of its tensors once.

    Args:
        flop: FLOPs of matrix products.
        gathered: values read by bilinear sampling, four for each sample and channel.
        added: values added to memory atomically.
    """

    flop: float = 0
    gathered: float = 0
    added: float = 0


@dataclass(frozen=True)
class Case:
    """Forward and backward pass of an operator.

    Args:
        run: function that runs both with tensors of a dtype.
        work: work of its kernels by name; kernels not named have no additional work.
    """

    run: Callable[[torch.dtype], None]
    work: dict[str, Work]


def _deform_conv(groups: int = 1) -> Case:
    height, width = SHAPES[0]

    def run(dtype: torch.dtype) -> None:
        features = torch.empty(1, CHANNELS, height, width, dtype=dtype)
        features = features.contiguous(memory_format=torch.channels_last)
        offset = torch.empty(1, 2 * TAPS, height, width)
        mask = torch.empty(1, TAPS, height, width)
        weight = torch.empty(CHANNELS, CHANNELS // groups, 3, 3, dtype=dtype)
        geometry = (1, 1, 1, groups)
        deform_conv.forward(features, offset, mask, weight, None, *geometry)
        deform_conv.backward(features, features, offset, mask, weight, *geometry, True, True, True)

    columns = height * width * TAPS * CHANNELS
    flop = 2 * columns * CHANNELS / groups
    gathered = CORNERS * columns
    return Case(
        run,
        {
            "forward": Work(flop, gathered),
            "sample_grad": Work(flop, gathered, added=gathered),
            "weight_grad": Work(flop, gathered),
        },
    )


def _fuse_levels(neighbours: bool) -> Case:
    def run(dtype: torch.dtype) -> None:
        same, half = (
            torch.empty(1, CHANNELS, *shape, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for shape in SHAPES[:2]
        )
        finer, coarser = (same.clone(), half) if neighbours else (None, None)
        maps = (same, finer, coarser, torch.ones(1, 2, dtype=torch.int64))
        moments, coefficients = torch.empty(3, 3, 1, CHANNELS), torch.empty(7, 1, CHANNELS)
        fuse_levels.moments(*maps)
        fuse_levels.fuse(*maps, coefficients)
        fuse_levels.coefficient_gradients(same.clone(), *maps, coefficients)
        fuse_levels.map_gradients(*maps, moments, moments.clone(), same.clone(), coefficients)

    return Case(run, {})


def _roi_align() -> Case:
    shapes = [side for shape in SHAPES for side in shape]
    rows = sum(height * width for height, width in SHAPES)

    def run(dtype: torch.dtype) -> None:
        boxes, sizes = torch.empty(1, BOXES, 4), torch.ones(1, 2, dtype=torch.int64)
        pooling = (boxes, sizes, shapes, STRIDES, BINS, SAMPLES, 1e3)
        pooled = roi_align.forward(torch.empty(1, rows, CHANNELS, dtype=dtype), *pooling)
        roi_align.backward(pooled, *pooling)

    gathered = BOXES * BINS**2 * SAMPLES**2 * CORNERS * CHANNELS
    return Case(run, {"forward": Work(gathered=gathered), "backward": Work(added=gathered)})


def _attention() -> Case:
    shapes = [side for shape in SHAPES[1:] for side in shape]
    rows, levels = sum(height * width for height, width in SHAPES[1:]), len(SHAPES) - 1

    def run(dtype: torch.dtype) -> None:
        value = torch.empty(1, rows, HEADS, CHANNELS // HEADS, dtype=dtype)
        locations = torch.empty(1, rows, HEADS, levels, POINTS, 2)
        weights = torch.empty(1, rows, HEADS, levels, POINTS)
        out = ms_deform_attn.forward(value, locations, weights, shapes)
        ms_deform_attn.backward(out, value, locations, weights, shapes, True, True)

    gathered = rows * levels * POINTS * CORNERS * CHANNELS
    return Case(
        run,
        {"forward": Work(gathered=gathered), "backward": Work(gathered=gathered, added=gathered)},
    )


CASES = {
    "deform_conv": _deform_conv(),
    "deform_conv, 32 groups": _deform_conv(groups=32),
    "fuse_levels": _fuse_levels(neighbours=True),
    "fuse_levels, no neighbours": _fuse_levels(neighbours=False),
    "roi_align": _roi_align(),
    "ms_deform_attn": _attention(),
}
