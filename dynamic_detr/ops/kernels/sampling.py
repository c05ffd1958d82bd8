"""Bilinear sampling in Triton: the index arithmetic that all kernels share."""

import os

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "corners", "dot_dtype"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a kernel multiplies matrices in: float32 where it is interpreted, else ``dtype``."""
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


@triton.jit
def corners(y, x, height, width):
    """The four neighbours of float32 positions on a map of height x width that zeros surround.

    Positions far outside, or not finite, are moved to where every neighbour is outside.

    Returns:
        y0, x0: int32, the upper left neighbour, which may be outside.
        fy, fx: float32, the fractions.
        top, bottom, left, right: whether those rows and columns are inside.
    """
    # comparisons with NaN are false in every version of Triton; minima and maxima differ
    y = tl.where((y > -2.0) & (y < height + 1.0), y, -2.0)
    x = tl.where((x > -2.0) & (x < width + 1.0), x, -2.0)
    floor_y, floor_x = tl.floor(y), tl.floor(x)
    fy, fx = y - floor_y, x - floor_x
    y0, x0 = floor_y.to(tl.int32), floor_x.to(tl.int32)
    top, bottom = (y0 >= 0) & (y0 < height), (y0 >= -1) & (y0 < height - 1)
    left, right = (x0 >= 0) & (x0 < width), (x0 >= -1) & (x0 < width - 1)
    return y0, x0, fy, fx, top, bottom, left, right
