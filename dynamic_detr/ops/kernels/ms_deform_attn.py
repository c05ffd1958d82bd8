"""Multi-scale deformable attention: the values of a head are gathered and summed in registers.

A program computes some outputs, each one head of one query, with all channels of the head. The
backward pass reads the same rows again. The gradients of locations and weights are sums over
channels within a program; the gradient of the values is summed with atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of_first
from .sampling import add_rows, corners, load_rows

__all__ = ["backward", "forward"]

TILE = 2048  # elements of the output per program; fewer for small outputs
MIN_PROGRAMS = 512  # several for every multiprocessor of a large GPU
WARP_TILE = 512  # elements per warp


@triton.jit
def _sample(
    locations, weights, index, exists, heights, widths, level: tl.constexpr, point,
    LEVELS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Return the index and the corners of one sample of each output, and its attention weight."""
    at = index * (LEVELS * POINTS) + level * POINTS + point
    x = tl.load(locations + 2 * at, mask=exists, other=0.0).to(tl.float32) * widths[level] - 0.5
    y = tl.load(locations + 2 * at + 1, mask=exists, other=0.0).to(tl.float32)
    y = y * heights[level] - 0.5
    y0, x0, fy, fx, top, bottom, left, right = corners(y, x, heights[level], widths[level])
    weight = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
    return at, y0, x0, fy, fx, top & exists, bottom & exists, left, right, weight


@triton.jit(do_not_specialize=["outputs", "queries", "rows"])
def _forward_kernel(
    value, locations, weights, out, heights, widths, outputs, queries, rows,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = number < outputs
    head, image = number % HEADS, number // HEADS // queries
    index = number.to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    channel_exists = channel < CHANNELS
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = image.to(tl.int64) * rows
    for level in tl.static_range(LEVELS):
        row_length = tl.cast(widths[level], tl.int32)
        for point in range(POINTS):
            _, y0, x0, fy, fx, top, bottom, left, right, weight = _sample(
                locations, weights, index, exists, heights, widths, level, point, LEVELS, POINTS
            )
            row = (first + y0 * row_length + x0) * HEADS + head
            above = value + (row * CHANNELS)[:, None] + channel[None, :]
            under = above + row_length * (HEADS * CHANNELS)
            upper, lower = (1.0 - fy) * weight, fy * weight
            part = load_rows(above, top & left, channel_exists)
            total += part * (upper * (1.0 - fx))[:, None]
            part = load_rows(above + HEADS * CHANNELS, top & right, channel_exists)
            total += part * (upper * fx)[:, None]
            part = load_rows(under, bottom & left, channel_exists)
            total += part * (lower * (1.0 - fx))[:, None]
            part = load_rows(under + HEADS * CHANNELS, bottom & right, channel_exists)
            total += part * (lower * fx)[:, None]
        first += tl.cast(heights[level], tl.int32) * row_length
    at = out + (index * CHANNELS)[:, None] + channel[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=exists[:, None] & channel_exists[None, :])


@triton.jit(do_not_specialize=["outputs", "queries", "rows"])
def _backward_kernel(
    grad_out, value, locations, weights, grad_value, grad_locations, grad_weights,
    heights, widths, outputs, queries, rows,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_SAMPLING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = number < outputs
    head, image = number % HEADS, number // HEADS // queries
    index = number.to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    channel_exists = channel < CHANNELS
    grad = load_rows(
        grad_out + (index * CHANNELS)[:, None] + channel[None, :], exists, channel_exists
    )
    first = image.to(tl.int64) * rows
    for level in tl.static_range(LEVELS):
        row_length = tl.cast(widths[level], tl.int32)
        for point in range(POINTS):
            at, y0, x0, fy, fx, top, bottom, left, right, weight = _sample(
                locations, weights, index, exists, heights, widths, level, point, LEVELS, POINTS
            )
            row = (first + y0 * row_length + x0) * HEADS + head
            above = (row * CHANNELS)[:, None] + channel[None, :]
            under = above + row_length * (HEADS * CHANNELS)
            if NEEDS_SAMPLING:
                # gradients of the corners' weights: s00 upper left, s01 upper right, ...
                dot = grad * load_rows(value + above, top & left, channel_exists)
                s00 = tl.sum(dot, axis=1)
                dot = grad * load_rows(
                    value + above + HEADS * CHANNELS, top & right, channel_exists
                )
                s01 = tl.sum(dot, axis=1)
                dot = grad * load_rows(value + under, bottom & left, channel_exists)
                s10 = tl.sum(dot, axis=1)
                dot = grad * load_rows(
                    value + under + HEADS * CHANNELS, bottom & right, channel_exists
                )
                s11 = tl.sum(dot, axis=1)
                along_x = (1.0 - fy) * (s01 - s00) + fy * (s11 - s10)
                along_y = (1.0 - fx) * (s10 - s00) + fx * (s11 - s01)
                sample = (1.0 - fy) * ((1.0 - fx) * s00 + fx * s01)
                sample += fy * ((1.0 - fx) * s10 + fx * s11)
                to = grad_locations.dtype.element_ty
                along_x, along_y = (
                    along_x * weight * widths[level],
                    along_y * weight * heights[level],
                )
                tl.store(grad_locations + 2 * at, along_x.to(to), mask=exists)
                tl.store(grad_locations + 2 * at + 1, along_y.to(to), mask=exists)
                tl.store(grad_weights + at, sample.to(grad_weights.dtype.element_ty), mask=exists)
            if NEEDS_VALUE:
                upper, lower = (1.0 - fy) * weight, fy * weight
                above, under = grad_value + above, grad_value + under
                add_rows(above, grad, upper * (1.0 - fx), top & left, channel_exists)
                above += HEADS * CHANNELS
                add_rows(above, grad, upper * fx, top & right, channel_exists)
                add_rows(under, grad, lower * (1.0 - fx), bottom & left, channel_exists)
                under += HEADS * CHANNELS
                add_rows(under, grad, lower * fx, bottom & right, channel_exists)
        first += tl.cast(heights[level], tl.int32) * row_length


@on_device_of_first
def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Tensor:
    """Compute `dynamic_detr.ops.ms_deform_attn` without autograd.

    Args:
        value: (B, ΣHW, heads, d) float32, bfloat16 or float16.
        locations: (B, Q, heads, L, P, 2) normalised x, y.
        weights: (B, Q, heads, L, P).
        shapes: H and W of each level: [H_0, W_0, H_1, W_1, ...].

    Returns:
        (B, Q, heads·d) in the dtype of value.
    """
    out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    _launch(
        _forward_kernel,
        (value.contiguous(), locations.contiguous(), weights.contiguous(), out),
        value,
        locations,
        shapes,
    )
    return out


@on_device_of_first
def backward(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[int],
    needs_value: bool,
    needs_sampling: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of value, locations and weights in their dtypes; None for those not
    needed. The gradient of value is summed in float32."""
    grad_value = grad_locations = grad_weights = None
    if needs_value:
        grad_value = value.new_zeros(value.shape, dtype=torch.float32)
    if needs_sampling:
        grad_locations = locations.new_empty(locations.shape)
        grad_weights = weights.new_empty(weights.shape)
    sources = [tensor.contiguous() for tensor in (grad_out, value, locations, weights)]
    _launch(
        _backward_kernel,
        (*sources, grad_value, grad_locations, grad_weights),
        value,
        locations,
        shapes,
        NEEDS_VALUE=needs_value,
        NEEDS_SAMPLING=needs_sampling,
    )
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(kernel, tensors, value, locations, shapes, **needs: bool) -> None:
    batch, queries, heads, levels, points, _ = locations.shape
    outputs, channels = batch * queries * heads, value.shape[-1]
    if outputs * channels == 0:
        return
    block_c = triton.next_power_of_2(channels)
    block_m = max(1, TILE // block_c)
    while block_m > 16 and outputs < block_m * MIN_PROGRAMS:
        block_m //= 2
    grid = (triton.cdiv(outputs, block_m),)
    # Sizes are passed as floats, which hold them exactly: Triton would recompile for integers of
    # another divisibility.
    kernel[grid](
        *tensors,
        tuple(float(height) for height in shapes[::2]),
        tuple(float(width) for width in shapes[1::2]),
        outputs,
        queries,
        value.shape[1],
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        CHANNELS=channels,
        **needs,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=max(1, min(4, block_m * block_c // WARP_TILE)),
    )
