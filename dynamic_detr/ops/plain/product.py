"""Matrix products of gathered rows, computed by the faster library for the processor.

On an x86 CPU, PyTorch uses MKL for float32 matrix products and oneDNN for convolutions. A product
of (M, K) rows is also a 1×1 convolution of a channels-last image of M pixels, which oneDNN computes
at least as fast. For the products of the backward pass, MKL is faster on Intel processors; on
others it reaches half the speed of oneDNN.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["grouped_product", "mkl_is_slow", "product", "row_gradient", "weight_gradient"]


def product(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write rows · weightᵀ to out.

    Args:
        rows: (M, K).
        weight: (N, K) in the dtype of rows.
        out: (M, N) in the dtype of rows.
    """
    if _is_emulated(rows):
        out.copy_(torch.mm(rows.float(), weight.float().t()))
    elif _is_for_onednn(rows):
        out.copy_(_convolved(rows, weight))
    else:
        torch.mm(rows, weight.t(), out=out)


def row_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient (M, K) of the rows of `product` from the gradient (M, N) of out."""
    if _is_emulated(grad):
        return torch.mm(grad.float(), weight.float()).to(grad.dtype)
    if _is_for_onednn(grad) and mkl_is_slow():
        return _convolved(grad, weight.t())
    return torch.mm(grad, weight)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient (N, K) of the weight of `product` from the gradient (M, N) of out."""
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
    """Return `torch.bmm` of (G, M, K) and (G, K, N): (G, M, N)."""
    if _is_emulated(a):
        return torch.bmm(a.float(), b.float()).to(a.dtype)
    return torch.bmm(a, b)


def _is_emulated(tensor: Tensor) -> bool:
    """Return whether products are float16 on a CPU, which are 90 times slower than in float32."""
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu"


def _is_for_onednn(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not len(tensor):
        return False
    return torch.backends.mkldnn.is_available()


@functools.cache
def mkl_is_slow() -> bool:
    """Return whether PyTorch uses MKL on a processor that is not Intel's."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        vendor = platform.processor()
    return "Intel" not in vendor


def _convolved(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows (M, K) · weight (N, K) transposed, (M, N), as a convolution. It calls oneDNN's
    operator, as `conv2d` uses MKL for 1×1 convolutions on one thread."""
    geometry = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    out = torch.ops.aten.mkldnn_convolution(
        _as_image(rows), weight[:, :, None, None], None, *geometry
    )
    return out.permute(0, 2, 3, 1).flatten(0, 2)


def _as_image(rows: Tensor) -> Tensor:
    """Return (M, K) as a channels-last image (1, K, 1, M), a view if the rows are contiguous."""
    return rows.contiguous()[None, None].permute(0, 3, 1, 2)
