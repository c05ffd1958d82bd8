"""Argument checks of the operators; every error is one line that names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_at_least", "check_spatial_shapes", "check_tensor"]

MAY_BE_ZERO = ("B", "Q")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    device: torch.device | None = None,
    integer: bool = False,
) -> None:
    """Check the dtype, device and shape of a tensor.

    Args:
        name: operator and argument, the beginning of the message.
        tensor: the argument.
        shape: size of each dimension, or a letter for any size. Sizes B and Q may be 0.
        device: expected device; None for any.
        integer: expect int32 or int64 instead of a floating dtype.

    Raises:
        ValueError: if the tensor does not fit.
    """
    if integer:
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    elif not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    fits = tensor.dim() == len(shape) and all(
        (size > 0 or expected in MAY_BE_ZERO) if isinstance(expected, str) else size == expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")


def check_at_least(operator: str, least: int, **numbers: int) -> None:
    """Check that arguments of an operator are integers >= `least`."""
    for name, number in numbers.items():
        if not isinstance(number, (int, torch.SymInt)) or number < least:
            raise ValueError(f"{operator}: {name}: expected an integer >= {least}, got {number!r}")


def check_spatial_shapes(name: str, shapes: object) -> None:
    """Check the sizes (H, W) of levels.

    They must be Python integers: reading them from a tensor would synchronise with the device.
    """
    fits = isinstance(shapes, (tuple, list)) and len(shapes) > 0
    for shape in shapes if fits else ():
        fits = fits and isinstance(shape, (tuple, list)) and len(shape) == 2
        fits = fits and all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in shape)
    if not fits:
        raise ValueError(
            f"{name}: expected a list of positive integers (H, W) for at least one level, "
            f"got {' '.join(repr(shapes).split())}"
        )
