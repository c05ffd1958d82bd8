"""What every operator says of an argument that does not fit, in one line."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_at_least", "check_spatial_shapes", "check_tensor"]

MAY_BE_ZERO = ("B", "Q", "M", "N")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    device: torch.device | None = None,
    integer: bool = False,
) -> None:
    """Checks kind, device and shape of a tensor.

    Args:
        name: operator and argument, as the message begins with.
        tensor: the argument.
        shape: for each dimension its size, or a name if any will do: of images B, queries Q
            and rows M, N there may be none, of all else there is at least one.
        device: where it is wanted; None for anywhere.
        integer: whether int32 or int64 is wanted, and not a floating dtype.

    Raises:
        ValueError: it does not fit.
    """
    if integer:
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {tensor.dtype}; wants int32 or int64.")
    elif not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; wants a floating dtype.")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; wants {device}.")
    fits = tensor.dim() == len(shape) and all(
        (found > 0 or wanted in MAY_BE_ZERO) if isinstance(wanted, str) else found == wanted
        for found, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wants ({wanted}).")


def check_at_least(operator: str, least: int, **numbers: int) -> None:
    """Checks that arguments of an operator are integers of at least that size."""
    for name, number in numbers.items():
        if not isinstance(number, (int, torch.SymInt)) or number < least:
            raise ValueError(f"{operator}: {name} is {number!r}; wants an integer >= {least}.")


def check_spatial_shapes(name: str, shapes: object) -> None:
    """Checks the sizes (H, W) of levels: Python's integers, as reading a tensor's would make the
    host wait for the device."""
    fits = isinstance(shapes, (tuple, list)) and len(shapes) > 0
    for shape in shapes if fits else ():
        fits = fits and isinstance(shape, (tuple, list)) and len(shape) == 2
        fits = fits and all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in shape)
    if not fits:
        raise ValueError(
            f"{name} is {' '.join(repr(shapes).split())}; "
            "wants a list of integers (H, W) of at least one level, all at least 1."
        )
