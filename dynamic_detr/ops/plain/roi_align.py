"""RoIAlign over a pyramid in plain PyTorch, as a gather from its table."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bilinear import BilinearSamples
from .gather import add_table_gradient, rows_of, weighted_gather

__all__ = ["assign_levels", "backward", "finest_area", "forward"]

CANONICAL_SIZE = 224  # pixels; boxes of this size are pooled from the canonical stride
CANONICAL_STRIDE = 16


def assign_levels(
    boxes: Tensor, strides: Sequence[int], canonical_size: float = CANONICAL_SIZE
) -> Tensor:
    """Assign each box to a level (Feature Pyramid Networks, equation 1).

    Areas are compared with thresholds instead of taking logarithms, so a box gets the same level on
    every device.

    Args:
        boxes: (..., 4) corners in pixels of the image.
        strides: stride of each of the L levels, each twice the one before.
        canonical_size: square root of the area that is assigned to stride 16, in pixels.

    Returns:
        (...) int64 in [0, L). Boxes that are empty, inverted or not finite get the finest level.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    level = torch.zeros_like(area, dtype=torch.int64)
    for step in range(1, len(strides)):
        level += area >= finest_area(strides, canonical_size) * 4**step
    return level.where(area < math.inf, 0)


def finest_area(strides: Sequence[int], canonical_size: float) -> float:
    """Return the area A such that boxes of area >= A · 4^l are assigned to level l or above."""
    return (canonical_size * strides[0] / CANONICAL_STRIDE) ** 2


def forward(
    table: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Compute `dynamic_detr.ops.pyramid_roi_align` without autograd.

    `shapes` holds H and W of each level: [H_0, W_0, H_1, W_1, ...].
    """
    index, weight = _samples(
        boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size
    )
    pooled = weighted_gather(table.detach().flatten(0, 1), index, weight)
    return pooled.view(*boxes.shape[:2], output_size**2, table.shape[-1])


def backward(
    grad_out: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    """Return the gradient of the table (B, ΣHW, C), summed in float32 or wider."""
    shape = (boxes.shape[0], rows_of(shapes), grad_out.shape[-1])
    if grad_out.numel() == 0:
        return grad_out.new_zeros(shape)
    index, weight = _samples(
        boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size
    )
    grad_table = grad_out.new_zeros(shape, dtype=torch.promote_types(grad_out.dtype, torch.float32))
    add_table_gradient(grad_table.flatten(0, 1), grad_out.flatten(0, 2), index, weight)
    return grad_table.to(grad_out.dtype)


def _samples(
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> tuple[Tensor, Tensor]:
    """Return rows of the flattened table and weights for each bin, (B·Q·R², sampling_ratio²·4)."""
    level = assign_levels(boxes, strides, canonical_size)  # (B, Q)
    first_rows = [rows_of(shapes[: 2 * i]) for i in range(len(strides))]
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    first_row = _of_level(level, first_rows) + image * rows_of(shapes)
    stride = _of_level(level, strides)[..., None]
    # true height and width of the level of each box, at most those of its features: (B, Q, 2)
    size = (image_sizes[:, None] + stride - 1).div(stride, rounding_mode="floor")
    level_width = _of_level(level, shapes[1::2])
    level_size = torch.stack([_of_level(level, shapes[::2]), level_width], dim=-1)
    size = torch.minimum(size, level_size)

    corners = boxes / stride - 0.5
    samples = output_size * sampling_ratio
    steps = (torch.arange(samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / samples
    extent = corners[..., 2:] - corners[..., :2]
    x = corners[..., 0, None] + extent[..., 0, None] * steps  # (B, Q, samples)
    y = corners[..., 1, None] + extent[..., 1, None] * steps
    height, width = size[..., 0, None], size[..., 1, None]
    inside_y, inside_x = (y >= -1) & (y <= height), (x >= -1) & (x <= width)
    y = torch.minimum(y.clamp(min=0), (height - 1).to(y.dtype))
    x = torch.minimum(x.clamp(min=0), (width - 1).to(x.dtype))

    bilinear = BilinearSamples(
        y[..., :, None], x[..., None, :], height[..., None], width[..., None]
    )  # (B, Q, samples, samples)
    inside = (inside_y[..., :, None] & inside_x[..., None, :])[..., None]
    weight = bilinear.weight().where(inside, 0) / sampling_ratio**2
    index = bilinear.index(level_width[..., None, None]) + first_row[..., None, None, None]

    def by_bin(values: Tensor) -> Tensor:
        grid = (output_size, sampling_ratio)
        values = values.unflatten(2, grid).unflatten(4, grid)  # (B, Q, R, s, R, s, 4)
        return values.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(0, 3)

    return by_bin(index), by_bin(weight)


def _of_level(level: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return numbers[level], without a copy from the host, which would synchronise."""
    chosen = torch.full_like(level, numbers[0])
    for other, number in enumerate(numbers[1:], start=1):
        chosen = chosen.where(level != other, number)
    return chosen
