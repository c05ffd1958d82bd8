"""Baselines of the project's operators, made of the operators of torchvision, Detectron2, PyTorch
and SciPy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dynamic_detr.losses.matcher import HungarianMatcher

__all__ = [
    "pool_levels",
    "baseline_deform_conv2d",
    "baseline_fusion",
    "baseline_matching",
    "baseline_ms_deform_attn",
    "baseline_operators",
    "baseline_roi_align",
]


def baseline_deform_conv2d(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias=None, *geometry, **kw
) -> Tensor:
    """Call torchvision's operator, which needs one dtype for all arguments; bfloat16 is cast."""
    dtype = torch.float32 if input.dtype == torch.bfloat16 else input.dtype
    input, offset, mask, weight, bias = (
        None if t is None else t.to(dtype) for t in (input, offset, mask, weight, bias)
    )
    return torchvision.ops.deform_conv2d(
        input.contiguous(), offset, weight, bias, *geometry, mask=mask, **kw
    )


def pool_levels(
    levels: list[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Pool boxes by Detectron2's pooler: one RoIAlign and one synchronisation per level.

    Args:
        levels: maps (B, C, H, W).
        strides: stride of each level in pixels.
        boxes: (B, Q, 4), corners in pixels.
        output_size: bins along each side.
        sampling_ratio: samples along each side of a bin.
        canonical_size: side in pixels of a box that is pooled from the level of stride 16.

    Returns:
        (B, Q, bins, C).
    """
    scales = [1 / stride for stride in strides]
    pooler = ROIPooler(output_size, scales, sampling_ratio, "ROIAlignV2", int(canonical_size))
    regions = pooler(levels, [Boxes(b) for b in boxes.detach()])
    return regions.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])


def baseline_roi_align(
    table: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Tensor,
    boxes: Tensor,
    *options,
) -> Tensor:
    """Call `pool_levels` with the arguments of `pyramid_roi_align`."""
    parts = table.split([height * width for height, width in spatial_shapes], dim=1)
    levels = [
        part.transpose(1, 2).unflatten(2, tuple(shape))
        for part, shape in zip(parts, spatial_shapes, strict=True)
    ]
    return pool_levels(levels, strides, boxes, *options)


def baseline_ms_deform_attn(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Compute multi-scale deformable attention with one `grid_sample` per level."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    levels = value.split([height * width for height, width in shapes], dim=1)
    samples = []
    for level, (height, width) in enumerate(shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B·heads, Q, P)
        samples.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    stacked = torch.stack(samples, dim=3).flatten(3)  # (B·heads, d, Q, L·P)
    by_head = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]  # (B·heads, 1, Q, L·P)
    out = (stacked * by_head.to(stacked.dtype)).sum(dim=-1)
    return out.view(batch, heads * channels, queries).transpose(1, 2)


def baseline_fusion(level: Tensor, other: Tensor) -> Tensor:
    """Fuse two levels: norm, resize the other one, mean, and a maximum of two linear functions.

    Args:
        level: (B, C, H, W).
        other: (B, C, H', W').
    """
    size = level.shape[-2:]
    level, other = F.group_norm(level, 16), F.group_norm(other, 16)
    if other.shape[-2:] != size:
        other = F.interpolate(other, size, mode="bilinear", align_corners=False)
    mean = (level + other) / 2
    return torch.maximum(mean, mean / 2)


def baseline_matching(
    matcher: HungarianMatcher,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    objects: Tensor,
    counts: list[int],
) -> Tensor:
    """Match one stage and image at a time: costs, transfer to the CPU, assignment."""
    queries = []
    for stage in range(len(logits)):
        parts = zip(labels.split(counts), objects.split(counts), strict=True)
        for image, (label, box) in enumerate(parts):
            prediction = (values[stage, image][None, None] for values in (logits, boxes))
            cost = matcher.pair_costs(*prediction, label, box, [len(label)])[:, 0]
            query, _ = linear_sum_assignment(cost.T.cpu())
            queries.append(torch.as_tensor(query, device=logits.device))
    return torch.cat(queries)


@contextmanager
def baseline_operators() -> Iterator[None]:
    """Run the detector on torchvision's and Detectron2's operators within this context."""
    encoder = "dynamic_detr.encoders.dynamic_block.deform_conv2d"
    decoder = "dynamic_detr.decoders.dynamic_stage.pyramid_roi_align"
    with mock.patch(encoder, baseline_deform_conv2d), mock.patch(decoder, baseline_roi_align):
        yield
