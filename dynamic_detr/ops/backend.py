"""Which implementation of an operator runs: a Triton kernel on a GPU, else plain PyTorch."""

import functools
import os
import warnings

import torch
from torch import Tensor

__all__ = ["kernel_serves", "triton_problem"]

SWITCH = "DYNAMIC_DETR_KERNELS"  # an environment variable; 0 leaves the kernels out
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot run a kernel on this machine's GPU; None if it can.

    The kernels are compiled when they are first used, for which Triton needs a C compiler. A
    trivial kernel is run to find out, once a process.
    """
    try:
        from .kernels.probe import probe

        probe()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the package triton"
    except Exception as error:  # whatever a compiler or a driver may say
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"Triton cannot compile kernels here ({reason}); is there a C compiler (CC)?"
    return None


def kernel_serves(tensor: Tensor) -> bool:
    """Whether a Triton kernel computes what concerns this tensor.

    True for float32, bfloat16 and float16 on a CUDA device where Triton works. Where it does
    not, the first call warns, and everything runs on PyTorch's own operators. The environment
    variable DYNAMIC_DETR_KERNELS=0 asks for these, to tell a kernel's fault from another.
    """
    if not tensor.is_cuda or tensor.dtype not in KERNEL_DTYPES or os.environ.get(SWITCH) == "0":
        return False
    problem = triton_problem()
    if problem is not None:
        _warn(problem)
    return problem is None


@functools.cache
def _warn(problem: str) -> None:
    warnings.warn(
        f"{problem}. Operators run on PyTorch's own gather, several times slower.", stacklevel=3
    )
