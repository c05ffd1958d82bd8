"""Gradients of the maps of a level in Triton, through their moments and their fusion at once.

A program writes the gradients of a block of the coarser map and of the pixels of the level that it
covers. It also computes the gradient of the sum for one row and column around these pixels, which
the upsampled block reaches. No atomics are needed, so the result is deterministic.
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

__all__ = ["map_gradients"]

ROWS = 8  # rows of the coarser map per program


@on_device_of_first
def map_gradients(
    same: Tensor,
    finer: Tensor | None,
    coarser: Tensor | None,
    sizes: Tensor,
    moments: Tensor,
    grad_moments: Tensor,
    grad_out: Tensor,
    coefficients: Tensor,
) -> list[Tensor]:
    """Compute `plain.fuse_levels.map_gradients`: three maps, empty for None."""
    maps = same, finer, coarser, grad_out = tuple(
        channels_last(m) for m in (same, finer, coarser, grad_out)
    )
    grads = [
        same.new_empty(0) if m is None else torch.empty_like(m, memory_format=torch.channels_last)
        for m in maps[:3]
    ]
    batch, channels, height, width = same.shape
    half_height, half_width = (height + 1) // 2, (width + 1) // 2
    blocks = block_sizes(channels, 512)
    blocks["BLOCK_P"] = min(blocks["BLOCK_P"], triton.next_power_of_2(half_width))
    if same.numel():
        strips = triton.cdiv(half_width, blocks["BLOCK_P"])
        programs = triton.cdiv(half_height, ROWS) * strips
        _gradient_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_C"]), batch)](
            same, finer, coarser, sizes.contiguous(), moments.contiguous(),
            grad_moments.contiguous(), grad_out, coefficients.contiguous(),
            *grads, strips, batch, channels, height, width,
            HAS_FINER=finer is not None, HAS_COARSER=coarser is not None, ROWS=ROWS, **blocks,
        )  # fmt: skip
    return grads


@triton.jit
def _through_moments(moments, grad_moments, which, count, image, batch, channels, c, c_mask):
    """Return slope, shift and the gradient of the mean after upsampling, each (1, channels).

    The gradient of a pixel y through mean and variance of its map is y · slope + shift.
    """
    own = (which * batch + image) * channels + c
    step = 3 * batch * channels
    mean = tl.load(moments + own, c_mask, 0)
    mean_grad = tl.load(grad_moments + own, c_mask, 0)
    slope = 2 * tl.load(grad_moments + step + own, c_mask, 0) / count
    upsampled_mean_grad = tl.load(grad_moments + 2 * step + own, c_mask, 0)
    shift = mean_grad / count - slope * mean
    return slope[None, :], shift[None, :], upsampled_mean_grad[None, :]


@triton.jit(do_not_specialize=["strips", "batch", "height", "width"])
def _gradient_kernel(
    same, finer, coarser, sizes, moments, grad_moments, grad_out, coefficients,
    same_grad, finer_grad, coarser_grad, strips, batch, channels, height, width,
    HAS_FINER: tl.constexpr, HAS_COARSER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of ROWS × BLOCK_P pixels of the coarser map and of the pixels they cover.

    Rows of the level are processed in pairs (2m - 1, 2m), which lie between the coarse rows m - 1
    and m. The contribution of a pair to row m is carried to the next pair, which completes it. The
    columns 2j - 1 ... 2j + 2 that coarse column j reaches are four tiles of pixels; the program
    writes the middle two.
    """
    image = tl.program_id(2)
    first_row = tl.program_id(0) // strips * ROWS
    j = tl.program_id(0) % strips * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    h, w = true_size(sizes, image, height, width)
    half_h, half_w = (h + 1) // 2, (w + 1) // 2
    half_height, half_width = (height + 1) // 2, (width + 1) // 2
    start = image.to(tl.int64) * height * width
    half_start = image.to(tl.int64) * half_height * half_width
    count, half_count = (h * w).to(tl.float32), (half_h * half_w).to(tl.float32)

    same_slope, same_shift, extra = _through_moments(
        moments, grad_moments, 0, count, image, batch, channels, c, c_mask
    )
    same_shift += extra / count
    if HAS_FINER:
        finer_slope, finer_shift, extra = _through_moments(
            moments, grad_moments, 1, count, image, batch, channels, c, c_mask
        )
        finer_shift += extra / count
    if HAS_COARSER:
        coarser_slope, coarser_shift, extra = _through_moments(
            moments, grad_moments, 2, half_count, image, batch, channels, c, c_mask
        )
        covered_grad = extra / count
        left = tl.minimum(tl.maximum(j - 1, 0), half_w - 1)
        middle = tl.minimum(j, half_w - 1)
        right = tl.minimum(j + 1, half_w - 1)
        carried = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    same_gain, finer_gain, coarser_gain, a1, b1, a2, b2 = load_coefficients(
        coefficients, image, batch, channels, c, c_mask
    )

    for step in range(tl.minimum(ROWS, half_height - first_row) + 1):
        m = first_row + step
        if HAS_COARSER:
            # two coarse rows at three columns
            low, high, _ = upsampling(2 * m, half_h)
            low_start = half_start + tl.minimum(low, half_h - 1) * half_width
            high_start = half_start + high * half_width
            mask = (j < half_width)[:, None] & c_mask[None, :]
            low_left = _row(coarser, low_start, left, channels, c, mask)
            low_middle = _row(coarser, low_start, middle, channels, c, mask)
            low_right = _row(coarser, low_start, right, channels, c, mask)
            high_left = _row(coarser, high_start, left, channels, c, mask)
            high_middle = _row(coarser, high_start, middle, channels, c, mask)
            high_right = _row(coarser, high_start, right, channels, c, mask)
            odd = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            even = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for parity in tl.static_range(2):
            row = 2 * m - 1 + parity
            owned_row = (row >= 2 * first_row) & (row < 2 * (first_row + ROWS)) & (row < height)
            # widths, as the interpreter cannot mask with a scalar condition
            owned_width = tl.where(owned_row, width, 0)
            true_width = tl.where((row >= 0) & (row < h), w, 0)
            if HAS_COARSER:
                weight = 0.75 - 0.5 * parity  # of the low row
                at_left = weight * low_left + (1 - weight) * high_left
                at_middle = weight * low_middle + (1 - weight) * high_middle
                at_right = weight * low_right + (1 - weight) * high_right
            for side in tl.static_range(4):
                if HAS_COARSER | (side == 1) | (side == 2):
                    column = 2 * j - 1 + side
                    offset = (start + row * width + column)[:, None] * channels + c[None, :]
                    true = ((column >= 0) & (column < true_width))[:, None] & c_mask[None, :]
                    own_value = tl.load(same + offset, true, 0).to(tl.float32)
                    x = same_gain * own_value
                    if HAS_FINER:
                        finer_value = tl.load(finer + offset, true, 0).to(tl.float32)
                        x += finer_gain * finer_value
                    if HAS_COARSER:
                        if side == 0:
                            x += coarser_gain * (0.75 * at_left + 0.25 * at_middle)
                        elif side == 1:
                            x += coarser_gain * (0.25 * at_left + 0.75 * at_middle)
                        elif side == 2:
                            x += coarser_gain * (0.75 * at_middle + 0.25 * at_right)
                        else:
                            x += coarser_gain * (0.25 * at_middle + 0.75 * at_right)
                    share = first_share(x, a1, b1, a2, b2)
                    grad = tl.load(grad_out + offset, true, 0).to(tl.float32)
                    grad_x = grad * (share * a1 + (1 - share) * a2)
                    if HAS_COARSER:
                        # weight of coarse column j, including its replication at an edge
                        if side == 1:
                            reads = 0.75 + tl.where(j == 0, 0.25, 0.0)
                        elif side == 2:
                            reads = 0.75 + tl.where(j == half_w - 1, 0.25, 0.0)
                        else:
                            reads = tl.full((BLOCK_P,), 0.25, tl.float32)
                        if parity == 0:
                            odd += reads[:, None] * grad_x
                        else:
                            even += reads[:, None] * grad_x
                    if (side == 1) | (side == 2):
                        write = (column < owned_width)[:, None] & c_mask[None, :]
                        same_result = same_gain * grad_x + own_value * same_slope + same_shift
                        _write(same_grad + offset, same_result, true, write)
                        if HAS_FINER:
                            result = finer_gain * grad_x + finer_value * finer_slope + finer_shift
                            _write(finer_grad + offset, result, true, write)
        if HAS_COARSER:
            done = m - 1
            at_bottom = 0.75 + tl.where(done == half_h - 1, 0.25, 0.0)
            at_top = 0.75 + tl.where(m == 0, 0.25, 0.0)
            tall = tl.minimum(h - 2 * done, 2)
            wide = tl.minimum(w - 2 * j, 2)
            result = low_middle * coarser_slope + coarser_shift
            result += (tall * wide).to(tl.float32)[:, None] * covered_grad
            result += coarser_gain * (carried + at_bottom * odd + 0.25 * even)
            carried = 0.25 * odd + at_top * even
            offset = (half_start + done * half_width + j)[:, None] * channels + c[None, :]
            true = (j < tl.where(done < half_h, half_w, 0))[:, None] & c_mask[None, :]
            owned_width = tl.where((done >= first_row) & (done < half_height), half_width, 0)
            write = (j < owned_width)[:, None] & c_mask[None, :]
            _write(coarser_grad + offset, result, true, write)


@triton.jit
def _row(coarser, start, column, channels, c, mask):
    offset = (start + column)[:, None] * channels + c[None, :]
    return tl.load(coarser + offset, mask, 0).to(tl.float32)


@triton.jit
def _write(to, value, true, mask):
    """Store the value, or zero beyond the true size."""
    tl.store(to, tl.where(true, value, 0.0).to(to.dtype.element_ty), mask)
