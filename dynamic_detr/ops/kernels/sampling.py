"""Bilinear sampling in Triton: index arithmetic and access to rows of channels, for all kernels."""

import os

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "add_rows", "corners", "dot_dtype", "load_rows"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of a kernel's matrix products: float32 if interpreted, else ``dtype``."""
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


@triton.jit
def corners(y, x, height, width):
    """Return the four neighbours of float32 positions on a height × width map with zero padding.

    Positions far outside, or not finite, are moved to one whose neighbours are all outside.

    Returns:
        y0, x0: int32, the upper left neighbour, which may be outside.
        fy, fx: float32, the fractional parts.
        top, bottom, left, right: whether those rows and columns are inside.
    """
    # comparisons with NaN are false in every version of Triton; minimum and maximum differ
    y = tl.where((y > -2.0) & (y < height + 1.0), y, -2.0)
    x = tl.where((x > -2.0) & (x < width + 1.0), x, -2.0)
    floor_y, floor_x = tl.floor(y), tl.floor(x)
    fy, fx = y - floor_y, x - floor_x
    y0, x0 = floor_y.to(tl.int32), floor_x.to(tl.int32)
    top, bottom = (y0 >= 0) & (y0 < height), (y0 >= -1) & (y0 < height - 1)
    left, right = (x0 >= 0) & (x0 < width), (x0 >= -1) & (x0 < width - 1)
    return y0, x0, fy, fx, top, bottom, left, right


@triton.jit
def load_rows(pointer, inside, channel_exists):
    """Load (rows, channels) as float32, zero where a row is not inside."""
    keep = inside[:, None] & channel_exists[None, :]
    return tl.load(pointer, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def add_rows(pointer, grad, weight, inside, channel_exists):
    """Atomically add grad (rows, channels) times weight (rows,) where a row is inside."""
    keep = inside[:, None] & channel_exists[None, :]
    tl.atomic_add(pointer, grad * weight[:, None], mask=keep, sem="relaxed")
