"""The smallest kernel, to see whether Triton works."""

import torch
import triton
import triton.language as tl

__all__ = ["probe"]


@triton.jit
def _fill_kernel(out):
    tl.store(out, 1.0)


def probe() -> None:
    """Compiles and runs one kernel on the current GPU.

    Raises:
        Exception: whatever Triton, the compiler or the driver says where it does not work.
    """
    out = torch.zeros(1, device="cuda")
    _fill_kernel[(1,)](out)
    torch.cuda.synchronize()
    if out.item() != 1.0:
        raise RuntimeError("a test kernel wrote a wrong value")
