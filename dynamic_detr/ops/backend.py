"""Choice of an operator's implementation: a Triton kernel on a GPU, plain PyTorch elsewhere."""

import functools
import os
import warnings

import torch
from torch import Tensor

__all__ = ["kernel_serves", "triton_problem"]

SWITCH = "DYNAMIC_DETR_KERNELS"  # environment variable; 0 disables the kernels
OLDEST = (8, 0)  # Ampere: older GPUs lack bfloat16 and have too little shared memory
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_problems: dict[torch.device, str | None] = {}


def triton_problem(device: torch.device) -> str | None:
    """Return why Triton cannot run the kernels on this GPU, or None if it can.

    Triton compiles a kernel at its first launch and needs a C compiler for that. The first call for
    each GPU runs a trivial kernel. During the capture of a CUDA graph, which must not synchronise,
    an untested GPU counts as working.
    """
    if device not in _problems:
        if torch.cuda.is_current_stream_capturing():
            return None
        _problems[device] = _try(device)
    return _problems[device]


def _try(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is too old for the Triton kernels"
    torch.cuda.synchronize(device)  # raises errors of earlier launches, which are not Triton's
    try:
        from .kernels.probe import probe

        with torch.cuda.device(device):
            probe()
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the package triton"
    except Exception as error:  # compilers and drivers raise errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"Triton cannot compile kernels here ({reason}); is there a C compiler (CC)?"
    return None


def kernel_serves(tensor: Tensor) -> bool:
    """Return whether operators on this tensor run as Triton kernels.

    True for float32, bfloat16 and float16 on a CUDA device where Triton works. Where Triton does
    not work, the first call warns. DYNAMIC_DETR_KERNELS=0 in the environment disables the kernels,
    which tells whether a kernel causes a fault.
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
