"""Matrix products of gathered rows, by whichever library is fast on the processor.

PyTorch multiplies float32 matrices on an x86 CPU with MKL, and computes convolutions with oneDNN. A
product of (M, K) rows is the 1×1 convolution of a channels-last image of M pixels in one row, which
oneDNN computes at least as fast. MKL is ahead in the products of the backward pass on Intel's
processors alone; on others it runs at half of oneDNN's speed.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["grouped_product", "mkl_is_slow", "product", "row_gradient", "weight_gradient"]


def product(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes rows · weightᵀ.

    Args:
        rows: (M, K).
        weight: (N, K), in the dtype of rows.
        out: (M, N), in the dtype of rows.
    """
    if _is_emulated(rows):
        out.copy_(torch.mm(rows.float(), weight.float().t()))
    elif _is_for_onednn(rows):
        out.copy_(_convolved(rows, weight))
    else:
        torch.mm(rows, weight.t(), out=out)


def row_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (M, K) of the rows of `product`, from that of its result (M, N)."""
    if _is_emulated(grad):
        return torch.mm(grad.float(), weight.float()).to(grad.dtype)
    if _is_for_onednn(grad) and mkl_is_slow():
        return _convolved(grad, weight.t())
    return torch.mm(grad, weight)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient (N, K) of the weight of `product`, from that of its result (M, N)."""
    if _is_emulated(grad):
        return torch.mm(grad.float().t(), rows.float()).to(grad.dtype)
    if not (_is_for_onednn(grad) and mkl_is_slow()):
        return torch.mm(grad.t(), rows)
    weight = rows.new_empty((grad.shape[1], rows.shape[1], 1, 1))  # only its shape is used
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, …, groups
    return torch.ops.aten.convolution_backward(
        _as_image(grad), _as_image(rows), weight, None, *geometry, [False, True, False]
    )[1].flatten(1)


def grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm`, (G, M, N) from (G, M, K) and (G, K, N)."""
    if _is_emulated(a):
        return torch.bmm(a.float(), b.float()).to(a.dtype)
    return torch.bmm(a, b)


def _is_emulated(tensor: Tensor) -> bool:
    """float16 products on a CPU, 90 times slower than float32's."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _is_for_onednn(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not len(tensor):
        return False
    return torch.backends.mkldnn.is_available()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether PyTorch's float32 products run on MKL and the processor is not Intel's."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = platform.processor()
    return "Intel" not in vendor


def _convolved(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (M, K) times weight (N, K) transposed, (M, N), as a convolution. oneDNN's operator is
    named, as `conv2d` takes MKL for 1×1 convolutions on one thread."""
    geometry = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    out = torch.ops.aten.mkldnn_convolution(
        _as_image(rows), weight[:, :, None, None], None, *geometry
    )
    return out.permute(0, 2, 3, 1).flatten(0, 2)


def _as_image(rows: Tensor) -> Tensor:
    """(M, K) as a channels-last image (1, K, 1, M), a view if the rows are contiguous."""
    return rows.contiguous()[None, None].permute(0, 3, 1, 2)
