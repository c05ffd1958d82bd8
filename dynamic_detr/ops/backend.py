"""Which implementation of an operator runs: a Triton kernel on a GPU, else plain PyTorch."""

import functools
import os
import warnings

import torch
from torch import Tensor

__all__ = ["kernel_serves", "triton_problem"]

SWITCH = "DYNAMIC_DETR_KERNELS"  # an environment variable; 0 leaves the kernels out
OLDEST = (8, 0)  # Ampere: older GPUs have too little shared memory, and no bfloat16
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_problems: dict[torch.device, str | None] = {}


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run the kernels on this GPU; None if it can.

    The kernels are compiled when they are first used, for which Triton needs a C compiler. A
    trivial kernel is run to find out, once a process and GPU; never while a CUDA graph is captured,
    where nothing can be waited for.
    """
    if device not in _problems:
        if torch.cuda.is_current_stream_capturing():
            return None
        _problems[device] = _try(device)
    return _problems[device]


def _try(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is too old for the Triton kernels"
    torch.cuda.synchronize(device)  # what went wrong before is not Triton's fault
    try:
        from .kernels.probe import probe

        with torch.cuda.device(device):
            probe()
    except torch.OutOfMemoryError:
        raise
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
    problem = triton_problem(tensor.device)
    if problem is not None:
        _warn(problem)
    return problem is None


@functools.cache
def _warn(problem: str) -> None:
    warnings.warn(f"{problem}. Operators run in plain PyTorch instead.", stacklevel=3)
