"""Where a kernel is launched.

Sizes of images are no reason to compile a kernel anew, as Triton does for integers that are 1 or
another multiple of 16: kernels list them under `do_not_specialize`.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

__all__ = ["on_device_of_first"]

Result = TypeVar("Result")


def on_device_of_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes the device of the function's first tensor the current one, on which Triton launches."""

    @wraps(function)
    def launch(tensor: torch.Tensor, *args, **kwargs) -> Result:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return launch
