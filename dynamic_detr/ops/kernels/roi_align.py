"""RoIAlign over a pyramid: one launch for all levels, images and boxes.

A program computes some consecutive bins, of one or more boxes, for a block of channels. It
determines the level of each bin's box, then gathers rows of the table; the backward pass adds to
these rows with atomics. Consecutive bins are neighbours in the image and share rows in the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plain.gather import rows_of
from .launch import on_device_of_first
from .sampling import add_rows, corners, load_rows

__all__ = ["backward", "forward"]

TILE = 2048  # elements of the output per program
MAX_CHANNELS = 256  # channels per program


@triton.jit
def _place(
    index, exists, boxes, image_sizes, heights, widths, strides, queries, rows, finest_area,
    LEVELS: tl.constexpr, BINS: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Return level and positions of the bins.

    Returns:
        first: int64, first row in the table of the level of each bin's box, in its image.
        row_length: int32, rows of the table per step in y.
        height, width: float32, true size of the level.
        y, x: float32, position of the first sample of each bin.
        step_y, step_x: float32, distance between samples.
    """
    region = index // (BINS * BINS)
    bin_in_region = index - region * (BINS * BINS)
    row, column = bin_in_region // BINS, bin_in_region % BINS
    image = region // queries
    x1 = tl.load(boxes + region * 4, mask=exists, other=0.0).to(tl.float32)
    y1 = tl.load(boxes + region * 4 + 1, mask=exists, other=0.0).to(tl.float32)
    x2 = tl.load(boxes + region * 4 + 2, mask=exists, other=0.0).to(tl.float32)
    y2 = tl.load(boxes + region * 4 + 3, mask=exists, other=0.0).to(tl.float32)

    area = tl.maximum(x2 - x1, 0.0) * tl.maximum(y2 - y1, 0.0)
    level_row = tl.zeros_like(image)
    level_height, level_width = tl.zeros_like(area) + heights[0], tl.zeros_like(area) + widths[0]
    stride = tl.zeros_like(area) + strides[0]
    start = 0
    threshold = finest_area
    for level in tl.static_range(1, LEVELS):
        start += tl.cast(heights[level - 1], tl.int32) * tl.cast(widths[level - 1], tl.int32)
        threshold *= 4.0
        chosen = (area >= threshold) & (area < float("inf"))
        level_row = tl.where(chosen, start, level_row)
        level_height = tl.where(chosen, heights[level], level_height)
        level_width = tl.where(chosen, widths[level], level_width)
        stride = tl.where(chosen, strides[level], stride)

    true_height = tl.load(image_sizes + image * 2, mask=exists, other=1).to(tl.int32)
    true_width = tl.load(image_sizes + image * 2 + 1, mask=exists, other=1).to(tl.int32)
    whole_stride = stride.to(tl.int32)
    height = ((true_height + whole_stride - 1) // whole_stride).to(tl.float32)
    width = ((true_width + whole_stride - 1) // whole_stride).to(tl.float32)
    # never read beyond the features of a level
    height, width = tl.minimum(height, level_height), tl.minimum(width, level_width)

    x1, y1 = x1 / stride - 0.5, y1 / stride - 0.5
    step_x = (x2 / stride - 0.5 - x1) / (BINS * RATIO)
    step_y = (y2 / stride - 0.5 - y1) / (BINS * RATIO)
    y = y1 + step_y * ((row * RATIO).to(tl.float32) + 0.5)
    x = x1 + step_x * ((column * RATIO).to(tl.float32) + 0.5)
    first = image.to(tl.int64) * rows + level_row
    return first, level_width.to(tl.int32), height, width, y, x, step_y, step_x


@triton.jit
def _sample(y, x, height, width, exists):
    """Return the corners of samples, which are clamped to the edge, or outside, as in RoIAlign."""
    inside = exists & (y >= -1.0) & (y <= height) & (x >= -1.0) & (x <= width)
    y = tl.minimum(tl.maximum(y, 0.0), height - 1.0)
    x = tl.minimum(tl.maximum(x, 0.0), width - 1.0)
    y0, x0, fy, fx, _, bottom, _, right = corners(y, x, height, width)
    return y0, x0, fy, fx, inside, inside & bottom, inside & right, inside & bottom & right


@triton.jit(do_not_specialize=["bins", "queries", "rows"])
def _forward_kernel(
    table, boxes, image_sizes, out, heights, widths, strides, bins, queries, rows, finest_area,
    LEVELS: tl.constexpr, BINS: tl.constexpr, RATIO: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < bins
    first, row_length, height, width, y_first, x_first, step_y, step_x = _place(
        index, exists, boxes, image_sizes, heights, widths, strides, queries, rows, finest_area,
        LEVELS, BINS, RATIO,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_exists = channel < CHANNELS
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in range(RATIO):
        for j in range(RATIO):
            y0, x0, fy, fx, here, below, right, across = _sample(
                y_first + step_y * i, x_first + step_x * j, height, width, exists
            )
            above = table + ((first + y0 * row_length + x0) * CHANNELS)[:, None] + channel[None, :]
            under = above + (row_length * CHANNELS)[:, None]
            total += load_rows(above, here, channel_exists) * ((1.0 - fy) * (1.0 - fx))[:, None]
            total += load_rows(above + CHANNELS, right, channel_exists) * ((1.0 - fy) * fx)[:, None]
            total += load_rows(under, below, channel_exists) * (fy * (1.0 - fx))[:, None]
            total += load_rows(under + CHANNELS, across, channel_exists) * (fy * fx)[:, None]
    total = total / (RATIO * RATIO)
    at = out + (index.to(tl.int64) * CHANNELS)[:, None] + channel[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=exists[:, None] & channel_exists[None, :])


@triton.jit(do_not_specialize=["bins", "queries", "rows"])
def _backward_kernel(
    grad_out, boxes, image_sizes, grad_table, heights, widths, strides, bins, queries, rows,
    finest_area,
    LEVELS: tl.constexpr, BINS: tl.constexpr, RATIO: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < bins
    first, row_length, height, width, y_first, x_first, step_y, step_x = _place(
        index, exists, boxes, image_sizes, heights, widths, strides, queries, rows, finest_area,
        LEVELS, BINS, RATIO,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_exists = channel < CHANNELS
    at = grad_out + (index.to(tl.int64) * CHANNELS)[:, None] + channel[None, :]
    grad = tl.load(at, mask=exists[:, None] & channel_exists[None, :], other=0.0).to(tl.float32)
    grad = grad / (RATIO * RATIO)
    for i in range(RATIO):
        for j in range(RATIO):
            y0, x0, fy, fx, here, below, right, across = _sample(
                y_first + step_y * i, x_first + step_x * j, height, width, exists
            )
            row = (first + y0 * row_length + x0) * CHANNELS
            above = grad_table + row[:, None] + channel[None, :]
            under = above + (row_length * CHANNELS)[:, None]
            add_rows(above, grad, (1.0 - fy) * (1.0 - fx), here, channel_exists)
            add_rows(above + CHANNELS, grad, (1.0 - fy) * fx, right, channel_exists)
            add_rows(under, grad, fy * (1.0 - fx), below, channel_exists)
            add_rows(under + CHANNELS, grad, fy * fx, across, channel_exists)


@on_device_of_first
def forward(
    table: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    finest_area: float,
) -> Tensor:
    """Compute `dynamic_detr.ops.pyramid_roi_align` without autograd.

    Args:
        table: (B, ΣHW, C) float32, bfloat16 or float16.
        boxes: (B, Q, 4) corners in pixels.
        image_sizes: (B, 2) integers.
        shapes: H and W of each level: [H_0, W_0, H_1, W_1, ...].
        strides: stride of each level.
        output_size, sampling_ratio: bins per side of a box, samples per side of a bin.
        finest_area: result of `plain.roi_align.finest_area`.

    Returns:
        (B, Q, output_size², C) in the dtype of table.
    """
    out = table.new_empty(*boxes.shape[:2], output_size**2, table.shape[-1])
    _launch(
        _forward_kernel, table, out, boxes, image_sizes, shapes, strides,
        output_size, sampling_ratio, finest_area,
    )  # fmt: skip
    return out


@on_device_of_first
def backward(
    grad_out: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    finest_area: float,
) -> Tensor:
    """Return the gradient of the table (B, ΣHW, C) in the dtype of grad_out, summed in float32."""
    grad_table = grad_out.new_zeros(
        boxes.shape[0], rows_of(shapes), grad_out.shape[-1], dtype=torch.float32
    )
    _launch(
        _backward_kernel, grad_out, grad_table, boxes, image_sizes, shapes, strides,
        output_size, sampling_ratio, finest_area,
    )  # fmt: skip
    return grad_table.to(grad_out.dtype)


def _launch(
    kernel, source, target, boxes, image_sizes, shapes, strides,
    output_size, sampling_ratio, finest_area,
) -> None:  # fmt: skip
    batch, queries, _ = boxes.shape
    channels = source.shape[-1]
    bins = batch * queries * output_size**2
    if bins * channels == 0:
        return
    block_c = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    block_m = min(TILE // block_c, 64)
    grid = (triton.cdiv(bins, block_m), triton.cdiv(channels, block_c))
    # Sizes are passed as floats, which hold them exactly: Triton would recompile for integers of
    # another divisibility.
    kernel[grid](
        source.contiguous(), boxes.contiguous(), image_sizes.contiguous(), target,
        tuple(float(height) for height in shapes[::2]),
        tuple(float(width) for width in shapes[1::2]),
        tuple(float(stride) for stride in strides),
        bins, queries, rows_of(shapes), finest_area,
        LEVELS=len(strides), BINS=output_size, RATIO=sampling_ratio, CHANNELS=channels,
        BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
