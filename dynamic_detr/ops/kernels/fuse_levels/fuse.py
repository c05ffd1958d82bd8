"""Fusion of the maps of a level in Triton, the maximum of two linear functions of their weighted
sum; and the gradients of the coefficients.

The gradients of the coefficients are summed within slabs of pixels; a second, small kernel sums the
slabs in a fixed order, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device_of_first
from .common import (
    block_sizes,
    channels_last,
    first_share,
    load_coefficients,
    true_size,
    upsampling,
)

__all__ = ["coefficient_gradients", "fuse"]

TILES = 4  # tiles per program of the forward kernel
SLAB = 16  # tiles per program of the gradient kernel
COEFFICIENTS = tl.constexpr(7)


@on_device_of_first
def fuse(
    same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor, coefficients: Tensor
) -> Tensor:
    """Compute `plain.fuse_levels.fuse`: (B, C, H, W)."""
    same, finer, coarser = (channels_last(m) for m in (same, finer, coarser))
    out = torch.empty_like(same, memory_format=torch.channels_last)
    batch, channels, height, width = same.shape
    blocks = block_sizes(channels, 1024)
    programs = triton.cdiv(height * width, blocks["BLOCK_P"] * TILES)
    if out.numel():
        _fuse_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_C"]), batch)](
            same, finer, coarser, sizes.contiguous(), coefficients.contiguous(), out,
            batch, channels, height, width,
            HAS_FINER=finer is not None, HAS_COARSER=coarser is not None, TILES=TILES, **blocks,
        )  # fmt: skip
    return out


@on_device_of_first
def coefficient_gradients(
    grad_out: Tensor,
    same: Tensor,
    finer: Tensor | None,
    coarser: Tensor | None,
    sizes: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """Compute `plain.fuse_levels.coefficient_gradients`: (7, B, C)."""
    grad_out, same, finer, coarser = (channels_last(m) for m in (grad_out, same, finer, coarser))
    batch, channels, height, width = same.shape
    blocks = block_sizes(channels, 1024)
    slab = blocks["BLOCK_P"] * SLAB
    slabs = triton.cdiv(height * width, slab)
    channel_blocks = triton.cdiv(channels, blocks["BLOCK_C"])
    grads = torch.empty_like(coefficients, memory_format=torch.contiguous_format)
    if not same.numel():
        return grads.zero_()
    partial = grads.new_empty((batch, slabs, 7, channels))
    sizes = sizes.contiguous()
    _coefficient_kernel[(slabs, channel_blocks, batch)](
        grad_out, same, finer, coarser, sizes, coefficients.contiguous(), partial,
        batch, channels, height, width,
        HAS_FINER=finer is not None, HAS_COARSER=coarser is not None, SLAB=SLAB, **blocks,
    )  # fmt: skip
    _add_slabs_kernel[(7, channel_blocks, batch)](
        partial, sizes, grads, slabs, slab, batch, channels, height, width, BLOCK_T=16, **blocks
    )
    return grads


@triton.jit(do_not_specialize=["batch", "height", "width"])
def _fuse_kernel(
    same, finer, coarser, sizes, coefficients, out, batch, channels, height, width,
    HAS_FINER: tl.constexpr, HAS_COARSER: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    h, w = true_size(sizes, image, height, width)
    start = image.to(tl.int64) * height * width * channels
    half_width = (width + 1) // 2
    half_start = image.to(tl.int64) * ((height + 1) // 2) * half_width * channels

    same_gain, finer_gain, coarser_gain, a1, b1, a2, b2 = load_coefficients(
        coefficients, image, batch, channels, c, c_mask
    )

    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        row, column = pixel // width, pixel % width
        offset = start + pixel.to(tl.int64)[:, None] * channels + c[None, :]
        true = ((row < h) & (column < w))[:, None] & c_mask[None, :]
        x = same_gain * tl.load(same + offset, true, 0).to(tl.float32)
        if HAS_FINER:
            x += finer_gain * tl.load(finer + offset, true, 0).to(tl.float32)
        if HAS_COARSER:
            x += coarser_gain * _upsampled(
                coarser + half_start, row, column, h, w, half_width, channels, c, true
            )
        first, second = a1 * x + b1, a2 * x + b2
        level = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
        level = tl.where(true, level, 0.0)
        inside = (pixel < height * width)[:, None] & c_mask[None, :]
        tl.store(out + offset, level.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def _coefficient_kernel(
    grad_out, same, finer, coarser, sizes, coefficients, partial, batch, channels, height, width,
    HAS_FINER: tl.constexpr, HAS_COARSER: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum the gradients over one slab: SLAB tiles of true pixels of one image."""
    slab, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    h, w = true_size(sizes, image, height, width)
    first_pixel = slab * SLAB * BLOCK_P
    if first_pixel < h * w:
        start = image.to(tl.int64) * height * width * channels
        half_width = (width + 1) // 2
        half_start = image.to(tl.int64) * ((height + 1) // 2) * half_width * channels

        same_gain, finer_gain, coarser_gain, a1, b1, a2, b2 = load_coefficients(
            coefficients, image, batch, channels, c, c_mask
        )

        same_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        finer_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        coarser_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        a1_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        b1_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        a2_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        b2_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for tile in range(tl.cdiv(tl.minimum(h * w - first_pixel, SLAB * BLOCK_P), BLOCK_P)):
            pixel = first_pixel + tile * BLOCK_P + tl.arange(0, BLOCK_P)
            row, column = pixel // w, pixel % w
            offset = start + (row * width + column).to(tl.int64)[:, None] * channels + c[None, :]
            true = (pixel < h * w)[:, None] & c_mask[None, :]
            grad = tl.load(grad_out + offset, true, 0).to(tl.float32)
            own_value = tl.load(same + offset, true, 0).to(tl.float32)
            x = same_gain * own_value
            if HAS_FINER:
                finer_value = tl.load(finer + offset, true, 0).to(tl.float32)
                x += finer_gain * finer_value
            if HAS_COARSER:
                coarser_value = _upsampled(
                    coarser + half_start, row, column, h, w, half_width, channels, c, true
                )
                x += coarser_gain * coarser_value
            first = grad * first_share(x, a1, b1, a2, b2)
            second = grad - first
            grad_x = first * a1 + second * a2
            same_sum += grad_x * own_value
            if HAS_FINER:
                finer_sum += grad_x * finer_value
            if HAS_COARSER:
                coarser_sum += grad_x * coarser_value
            a1_sum += first * x
            b1_sum += first
            a2_sum += second * x
            b2_sum += second
        to = (
            partial + (image.to(tl.int64) * tl.num_programs(0) + slab) * COEFFICIENTS * channels + c
        )
        tl.store(to, tl.sum(same_sum, 0), c_mask)
        tl.store(to + channels, tl.sum(finer_sum, 0), c_mask)
        tl.store(to + 2 * channels, tl.sum(coarser_sum, 0), c_mask)
        tl.store(to + 3 * channels, tl.sum(a1_sum, 0), c_mask)
        tl.store(to + 4 * channels, tl.sum(b1_sum, 0), c_mask)
        tl.store(to + 5 * channels, tl.sum(a2_sum, 0), c_mask)
        tl.store(to + 6 * channels, tl.sum(b2_sum, 0), c_mask)


@triton.jit(do_not_specialize=["slabs", "slab", "batch", "height", "width"])
def _add_slabs_kernel(
    partial, sizes, grads, slabs, slab, batch, channels, height, width,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of one coefficient over the slabs of one image."""
    coefficient, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    h, w = true_size(sizes, image, height, width)
    filled = tl.cdiv(h * w, slab)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, filled, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        offset = ((image.to(tl.int64) * slabs + t) * COEFFICIENTS + coefficient) * channels
        mask = (t < filled)[:, None] & c_mask[None, :]
        total += tl.load(partial + offset[:, None] + c[None, :], mask, 0)
    tl.store(grads + (coefficient * batch + image) * channels + c, tl.sum(total, 0), c_mask)


@triton.jit
def _upsampled(coarser, row, column, h, w, half_width, channels, c, mask):
    """Return the upsampled coarser map at pixels (row, column) of the level, in float32.

    h and w are the true size of the level; `coarser` points to the image.
    """
    low_y, high_y, weight_y = upsampling(row, (h + 1) // 2)
    low_x, high_x, weight_x = upsampling(column, (w + 1) // 2)
    top, bottom = (low_y * half_width).to(tl.int64), (high_y * half_width).to(tl.int64)
    c = c[None, :]
    top_left = tl.load(coarser + ((top + low_x) * channels)[:, None] + c, mask, 0)
    top_right = tl.load(coarser + ((top + high_x) * channels)[:, None] + c, mask, 0)
    bottom_left = tl.load(coarser + ((bottom + low_x) * channels)[:, None] + c, mask, 0)
    bottom_right = tl.load(coarser + ((bottom + high_x) * channels)[:, None] + c, mask, 0)
    weight_x = weight_x[:, None]
    weight_y = weight_y[:, None]
    above = weight_x * top_left.to(tl.float32) + (1 - weight_x) * top_right.to(tl.float32)
    below = weight_x * bottom_left.to(tl.float32) + (1 - weight_x) * bottom_right.to(tl.float32)
    return weight_y * above + (1 - weight_y) * below
