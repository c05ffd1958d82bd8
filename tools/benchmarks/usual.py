"""The detector put together from the operators that everybody has: torchvision's deformable
convolution and Detectron2's RoI pooler in place of this project's own."""

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
    "usual_deform_conv2d",
    "usual_fusion",
    "usual_matching",
    "usual_ms_deform_attn",
    "usual_operators",
    "usual_roi_align",
]


def usual_deform_conv2d(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias=None, *geometry, **kw
) -> Tensor:
    """torchvision's operator, which wants all arguments in one dtype and has no bfloat16."""
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
    """Detectron2's pooler: a launch for each level, and a wait for each, as their boxes differ."""
    scales = [1 / stride for stride in strides]
    pooler = ROIPooler(output_size, scales, sampling_ratio, "ROIAlignV2", int(canonical_size))
    regions = pooler(levels, [Boxes(b) for b in boxes.detach()])
    return regions.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])


def usual_roi_align(
    table: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Tensor,
    boxes: Tensor,
    *options,
) -> Tensor:
    """`pool_levels` as the decoder calls it, of views of the table."""
    parts = table.split([height * width for height, width in spatial_shapes], dim=1)
    levels = [
        part.transpose(1, 2).unflatten(2, tuple(shape))
        for part, shape in zip(parts, spatial_shapes, strict=True)
    ]
    return pool_levels(levels, strides, boxes, *options)


def usual_ms_deform_attn(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention as a `grid_sample` for each level."""
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


def usual_fusion(*maps: Tensor) -> Tensor:
    """A level from its own map and another: norms, upsampling, mean and a maximum of two linear
    functions, an operation each."""
    normed = [F.group_norm(m, 16) for m in maps]
    size = maps[0].shape[-2:]
    if maps[1].shape[-2:] != size:
        normed[1] = F.interpolate(normed[1], size, mode="bilinear", align_corners=False)
    mean = sum(normed) / len(normed)
    return torch.maximum(mean, mean / 2)


def usual_matching(
    matcher: HungarianMatcher,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    objects: Tensor,
    counts: list[int],
) -> Tensor:
    """Costs, transfer and assignment of each stage and image, one after the other."""
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
def usual_operators() -> Iterator[None]:
    """Within it the detector runs on torchvision's and Detectron2's operators."""
    encoder = "dynamic_detr.encoders.dynamic_block.deform_conv2d"
    decoder = "dynamic_detr.decoders.dynamic_stage.pyramid_roi_align"
    with mock.patch(encoder, usual_deform_conv2d), mock.patch(decoder, usual_roi_align):
        yield
