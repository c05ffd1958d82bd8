"""Device of kernel launches.

Triton recompiles a kernel when an integer argument becomes 1 or changes its divisibility by 16. The
kernels list sizes of images under `do_not_specialize`, so that new sizes do not recompile them.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

__all__ = ["on_device_of_first"]

Result = TypeVar("Result")


def on_device_of_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run the function with its first tensor's device as the current one, which Triton uses."""

    @wraps(function)
    def launch(tensor: torch.Tensor, *args, **kwargs) -> Result:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **kwargs)

    return launch
