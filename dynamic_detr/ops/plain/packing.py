"""Packing of grouped convolutions: the weights of several narrow groups in one block-diagonal one.

The zeros outside the blocks make packed groups equivalent for finite features.
"""

import torch
from torch import Tensor

__all__ = ["groups_per_pack", "pack", "unpack"]


def groups_per_pack(groups: int, channels: int, max_channels: int) -> int:
    """Return the largest divisor n of `groups` with n · channels <= max_channels, at least 1."""
    fitting = (n for n in range(2, groups + 1) if groups % n == 0 and n * channels <= max_channels)
    return max(fitting, default=1)


def pack(weight: Tensor, groups: int, together: int) -> Tensor:
    """Return an equivalent weight with `groups / together` groups.

    Args:
        weight: (C_out, C / groups, kh, kw).
        groups: groups of the convolution.
        together: groups in a pack, a divisor of `groups`.

    Returns:
        (C_out, together · C / groups, kh, kw).
    """
    if together == 1:
        return weight
    packed = weight.new_zeros((weight.shape[0], together * weight.shape[1], *weight.shape[2:]))
    blocks = _blocks(packed, groups, together)
    blocks.copy_(weight.reshape(blocks.shape))
    return packed


def unpack(packed: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Return the blocks of a packed weight as a weight of the given shape; inverse of `pack`."""
    return _blocks(packed, groups, packed.shape[1] // shape[1]).reshape(shape)


def _blocks(packed: Tensor, groups: int, together: int) -> Tensor:
    """Return a view (packs, together, C_out / groups, C / groups, kh, kw) of the blocks."""
    blocks = packed.unflatten(0, (groups // together, together, -1)).unflatten(3, (together, -1))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
