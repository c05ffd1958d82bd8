"""What the kernels of `fuse_levels` share: true sizes, coefficients, and
between which pixels of the coarser neighbour those of a level lie.

All maps are channels-last and contiguous; a tile is (pixels, channels), with channels fastest.
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
    """Channels and pixels of a tile of so many numbers.

    64 channels in half precision are 128 bytes, a cache line; more would only cost registers, where
    every kernel holds several vectors of coefficients.
    """
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_C": block_c, "BLOCK_P": numbers // block_c}


def channels_last(features: Tensor | None) -> Tensor | None:
    """Contiguous in the layout that the kernels read."""
    return None if features is None else features.contiguous(memory_format=torch.channels_last)


@triton.jit
def true_size(sizes, image, height, width):
    """True height and width of the level, int32, at most those of its map."""
    h = tl.load(sizes + 2 * image).to(tl.int32)
    w = tl.load(sizes + 2 * image + 1).to(tl.int32)
    return tl.minimum(h, height), tl.minimum(w, width)


@triton.jit
def upsampling(position, true_length):
    """Between which rows (or columns) of the coarser map one of the level lies.

    Returns:
        low, high: int32, moved to the true edge where they are beyond it.
        weight: float32, of the low one; the high one has the rest.
    """
    low = (position + 1) // 2 - 1
    weight = 0.25 + 0.5 * (position % 2).to(tl.float32)
    high = tl.minimum(low + 1, true_length - 1)
    return tl.maximum(low, 0), high, weight


@triton.jit
def load_coefficients(coefficients, image, batch, channels, c, known):
    """The three gains, a1, b1, a2 and b2 of an image: each (1, channels)."""
    own = coefficients + image * channels + c[None, :]
    step = batch * channels
    known = known[None, :]
    return (
        tl.load(own, known, 0),
        tl.load(own + step, known, 0),
        tl.load(own + 2 * step, known, 0),
        tl.load(own + 3 * step, known, 0),
        tl.load(own + 4 * step, known, 0),
        tl.load(own + 5 * step, known, 0),
        tl.load(own + 6 * step, known, 0),
    )


@triton.jit
def first_share(x, a1, b1, a2, b2):
    """How much of the gradient the first linear function gets: all, none, or half where the two
    are equal."""
    first, second = a1 * x + b1, a2 * x + b2
    return tl.where(first > second, 1.0, tl.where(first == second, 0.5, 0.0))
