"""Parts of several kernels of `fuse_levels`: tile sizes, true sizes, coefficients and upsampling.

All maps are contiguous in channels-last memory. A tile is (pixels, channels).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "block_sizes",
    "channels_last",
    "first_share",
    "load_coefficients",
    "true_size",
    "upsampling",
]


def block_sizes(channels: int, numbers: int) -> dict[str, int]:
    """Return the channels and pixels of a tile of the given number of elements.

    64 channels in half precision fill a cache line of 128 bytes. More would cost registers, as
    every kernel holds several vectors of coefficients.
    """
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_C": block_c, "BLOCK_P": numbers // block_c}


def channels_last(features: Tensor | None) -> Tensor | None:
    """Return the map in contiguous channels-last memory."""
    return None if features is None else features.contiguous(memory_format=torch.channels_last)


@triton.jit
def true_size(sizes, image, height, width):
    """Return the true height and width of the level, int32, at most those of its map."""
    h = tl.load(sizes + 2 * image).to(tl.int32)
    w = tl.load(sizes + 2 * image + 1).to(tl.int32)
    return tl.minimum(h, height), tl.minimum(w, width)


@triton.jit
def upsampling(position, true_length):
    """Return the two rows (or columns) of the coarser map that interpolate one of the level.

    Returns:
        low, high: int32, clamped to the true map.
        weight: float32, weight of `low`; that of `high` is 1 - weight.
    """
    low = (position + 1) // 2 - 1
    weight = 0.25 + 0.5 * (position % 2).to(tl.float32)
    high = tl.minimum(low + 1, true_length - 1)
    return tl.maximum(low, 0), high, weight


@triton.jit
def load_coefficients(coefficients, image, batch, channels, c, c_mask):
    """Return the three gains, a1, b1, a2 and b2 of an image, each (1, channels)."""
    own = coefficients + image * channels + c[None, :]
    step = batch * channels
    c_mask = c_mask[None, :]
    return (
        tl.load(own, c_mask, 0),
        tl.load(own + step, c_mask, 0),
        tl.load(own + 2 * step, c_mask, 0),
        tl.load(own + 3 * step, c_mask, 0),
        tl.load(own + 4 * step, c_mask, 0),
        tl.load(own + 5 * step, c_mask, 0),
        tl.load(own + 6 * step, c_mask, 0),
    )


@triton.jit
def first_share(x, a1, b1, a2, b2):
    """Return the share of the gradient for the first linear function: 1 where it is larger, 0 where
    it is smaller, ½ where both are equal."""
    first, second = a1 * x + b1, a2 * x + b2
    return tl.where(first > second, 1.0, tl.where(first == second, 0.5, 0.0))
