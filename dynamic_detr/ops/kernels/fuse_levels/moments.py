"""Moments of the maps of a level in Triton.

Each pixel of a tile keeps a running mean and variance (Welford). They are combined within slabs of
pixels and then between slabs (Chan) in a fixed order, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device_of_first
from .common import block_sizes, channels_last, true_size

__all__ = ["moments"]

SLAB = 16  # tiles per program


@on_device_of_first
def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """Compute `plain.fuse_levels.moments`: (3, 3, B, C)."""
    same, finer, coarser = (channels_last(m) for m in (same, finer, coarser))
    batch, channels, height, width = same.shape
    out = same.new_empty((3, 3, batch, channels), dtype=torch.float32)
    if not same.numel():
        return out.zero_()
    blocks = block_sizes(channels, 1024)
    slab = blocks["BLOCK_P"] * SLAB
    slabs = triton.cdiv(height * width, slab)
    half_slabs = triton.cdiv(((height + 1) // 2) * ((width + 1) // 2), slab)
    programs = slabs if finer is None and coarser is None else 2 * slabs
    programs += 0 if coarser is None else half_slabs
    partial = out.new_empty((batch, programs, 3, channels))
    channel_blocks = triton.cdiv(channels, blocks["BLOCK_C"])
    sizes = sizes.contiguous()
    kinds = {"HAS_FINER": finer is not None, "HAS_COARSER": coarser is not None}
    _slab_kernel[(programs, channel_blocks, batch)](
        same, finer, coarser, sizes, partial, slabs, programs,
        channels, height, width, SLAB=SLAB, **kinds, **blocks,
    )  # fmt: skip
    _combine_kernel[(3, channel_blocks, batch)](
        partial, sizes, out, slabs, programs, slab,
        batch, channels, height, width, BLOCK_T=16, **kinds, **blocks,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["slabs", "all_slabs", "height", "width"])
def _slab_kernel(
    same, finer, coarser, sizes, partial, slabs, all_slabs, channels, height, width,
    HAS_FINER: tl.constexpr, HAS_COARSER: tl.constexpr, SLAB: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the moments of one slab: programs are slabs of same, then of finer, then coarser."""
    program, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h, w = true_size(sizes, image, height, width)
    to = partial + (image.to(tl.int64) * all_slabs + program) * 3 * channels + c
    start = image.to(tl.int64) * height * width * channels
    _measure(
        same + start, to, program, h, w, h, w, width, channels, c, False, SLAB, BLOCK_P, BLOCK_C
    )
    if HAS_FINER:
        _measure(
            finer + start, to, program - slabs, h, w, h, w, width,
            channels, c, False, SLAB, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    if HAS_COARSER:
        half_height, half_width = (height + 1) // 2, (width + 1) // 2
        half_start = image.to(tl.int64) * half_height * half_width * channels
        _measure(
            coarser + half_start, to, program - 2 * slabs, (h + 1) // 2, (w + 1) // 2, h, w,
            half_width, channels, c, True, SLAB, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _measure(
    features, to, slab, h, w, level_h, level_w, row_length, channels, c,
    HALF: tl.constexpr, SLAB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store three statistics of a slab of the h × w true pixels of an image, if the slab exists.

    These are the mean, the sum of centred squares, and the sum of pixels weighted by the number of
    pixels of the level that each covers: up to 4 in the coarser map, else 1.
    """
    first = slab * SLAB * BLOCK_P
    if (first >= 0) & (first < h * w):
        c_mask = c < channels
        lane = tl.arange(0, BLOCK_P)
        mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        covered_sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        count = tl.zeros((BLOCK_P,), tl.float32)
        for tile in range(tl.cdiv(tl.minimum(h * w - first, SLAB * BLOCK_P), BLOCK_P)):
            pixel = first + tile * BLOCK_P + lane
            row, column = pixel // w, pixel % w
            offset = (row * row_length + column).to(tl.int64)[:, None] * channels + c[None, :]
            true = pixel < h * w
            value = tl.load(features + offset, true[:, None] & c_mask[None, :], 0).to(tl.float32)
            count += tl.where(true, 1.0, 0.0)
            delta = tl.where(true[:, None], value - mean, 0.0)
            mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
            squares += delta * (value - mean)
            if HALF:
                tall = tl.minimum(level_h - 2 * row, 2)
                wide = tl.minimum(level_w - 2 * column, 2)
                covered_sums += (tall * wide).to(tl.float32)[:, None] * value
        total = tl.sum(count, 0)
        slab_mean = tl.sum(mean * count[:, None], 0) / total
        apart = mean - slab_mean[None, :]
        squares += count[:, None] * apart * apart
        tl.store(to, slab_mean, c_mask)
        tl.store(to + channels, tl.sum(squares, 0), c_mask)
        covered_sum = tl.sum(covered_sums, 0) if HALF else slab_mean * total
        tl.store(to + 2 * channels, covered_sum, c_mask)


@triton.jit(do_not_specialize=["slabs", "all_slabs", "slab", "batch", "height", "width"])
def _combine_kernel(
    partial, sizes, moments, slabs, all_slabs, slab, batch, channels, height, width,
    HAS_FINER: tl.constexpr, HAS_COARSER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combine the slabs of one map (0 same, 1 finer, 2 coarser) of one image."""
    which, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    h, w = true_size(sizes, image, height, width)
    level_count = (h * w).to(tl.float32)
    if which == 2:
        h, w = (h + 1) // 2, (w + 1) // 2
    count = (h * w).to(tl.float32)
    filled = tl.cdiv(h * w, slab)
    if not HAS_FINER:
        filled = tl.where(which == 1, 0, filled)
    if not HAS_COARSER:
        filled = tl.where(which == 2, 0, filled)
    start = partial + (image.to(tl.int64) * all_slabs + which * slabs) * 3 * channels

    mean_sum = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    covered_sum = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, filled, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        offset = (t * 3 * channels)[:, None] + c[None, :]
        mask = (t < filled)[:, None] & c_mask[None, :]
        size = tl.minimum(h * w - t * slab, slab).to(tl.float32)[:, None]
        mean_sum += size * tl.load(start + offset, mask, 0)
        covered_sum += tl.load(start + offset + 2 * channels, mask, 0)
    mean = tl.sum(mean_sum, 0) / count

    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, filled, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        offset = (t * 3 * channels)[:, None] + c[None, :]
        mask = (t < filled)[:, None] & c_mask[None, :]
        size = tl.minimum(h * w - t * slab, slab).to(tl.float32)[:, None]
        apart = tl.where(mask, tl.load(start + offset, mask, 0) - mean[None, :], 0.0)
        squares += tl.load(start + offset + channels, mask, 0) + size * apart * apart
    to = moments + (which * batch + image) * channels + c
    step = 3 * batch * channels
    tl.store(to, mean, c_mask)
    tl.store(to + step, tl.sum(squares, 0) / count, c_mask)
    tl.store(to + 2 * step, tl.sum(covered_sum, 0) / level_count, c_mask)
