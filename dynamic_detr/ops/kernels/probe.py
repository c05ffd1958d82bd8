"""A minimal kernel that tests whether Triton works."""

import torch
import triton
import triton.language as tl

__all__ = ["probe"]


@triton.jit
def _fill_kernel(out):
    tl.store(out, 1.0)


def probe() -> None:
    """Compile and run one kernel on the current GPU.

    Raises:
        Exception: any error of Triton, the compiler or the driver.
    """
    out = torch.zeros(1, device="cuda")
    _fill_kernel[(1,)](out)
    torch.cuda.synchronize()
    if out.item() != 1.0:
        raise RuntimeError("a test kernel wrote a wrong value")
