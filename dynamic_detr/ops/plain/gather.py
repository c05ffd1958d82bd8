"""Weighted sums of rows of a table, and their gradients.

Deformable convolution, RoIAlign and deformable attention sample feature maps at fractional
positions. In a table with one row of channels for each pixel, a bilinear sample is a weighted sum
of four rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_table_gradient", "rows_of", "weight_gradient", "weighted_gather"]

NARROW = 64  # up to this many channels, a copy of the rows is faster than PyTorch's operator
GATHERED = 2**19  # elements copied at a time: 2 MiB of float32


def rows_of(shapes: Sequence[int]) -> int:
    """Return the rows ΣHW of a table of levels with sizes [H_0, W_0, H_1, W_1, ...]."""
    return sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))


def weighted_gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return out[m] = Σ_j weight[m, j] · table[index[m, j]].

    The weights are rounded to the dtype of the table; sums are taken in float32 or wider. The
    operators compute gradients with `add_table_gradient` and `weight_gradient` instead of autograd,
    which would sum the gradient of a bfloat16 table in bfloat16.

    Args:
        table: (N, C) floating point.
        index: (M, J) integers in [0, N).
        weight: (M, J) floating point.

    Returns:
        (M, C) in the dtype of the table.
    """
    if index.shape[0] == 0:
        return table.new_zeros((0, table.shape[1]))
    with torch.autocast(table.device.type, enabled=False):
        return F.embedding_bag(index, table, per_sample_weights=weight.to(table.dtype), mode="sum")


def add_table_gradient(grad_table: Tensor, grad_out: Tensor, index: Tensor, weight: Tensor) -> None:
    """Add the gradient of the table of `weighted_gather` to `grad_table`, deterministically.

    The gradient is itself a gather: each row of the table sums the outputs that it contributed to.

    Args:
        grad_table: (N, C) in float32 or wider, modified in place.
        grad_out: (M, C).
        index, weight: arguments of `weighted_gather`, M at least 1.
    """
    first, end = 0, grad_table.shape[0]
    if index.device.type == "cpu":  # reading the range is free here; nearby outputs share few rows
        low, high = index.aminmax()
        first, end = int(low), int(high) + 1
    row, order = index.flatten().sort(stable=True)
    rows = torch.arange(first, end, device=index.device, dtype=index.dtype)
    bag = torch.arange(index.shape[0], device=index.device, dtype=torch.int32)
    grad_table[first:end] += F.embedding_bag(
        bag.repeat_interleave(index.shape[1]).index_select(0, order),
        grad_out.to(grad_table.dtype),
        torch.searchsorted(row, rows, out_int32=True),
        per_sample_weights=weight.flatten().index_select(0, order).to(grad_table.dtype),
        mode="sum",
    )


def weight_gradient(grad_out: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Return the gradient of the weights of `weighted_gather`, (M, J) in float32 or wider.

    Args:
        grad_out: (M, C).
        table, index: arguments of `weighted_gather`, M at least 1.
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    grad_out = grad_out.to(table.dtype)
    bags, rows = index.shape
    if table.device.type == "cpu" and table.shape[1] <= NARROW:
        grad = table.new_empty(bags, rows)
        step = max(1, GATHERED // (rows * table.shape[1]))
        for first in range(0, bags, step):
            part = slice(first, first + step)
            chosen = table.index_select(0, index[part].flatten()).view(-1, rows, table.shape[1])
            torch.sum(chosen.mul_(grad_out[part, None]), dim=-1, out=grad[part])
        return grad
    first = torch.arange(0, bags * rows, rows, device=index.device, dtype=index.dtype)
    bag = torch.arange(bags, device=index.device, dtype=index.dtype).repeat_interleave(rows)
    grad = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_out.contiguous(), table, index.flatten(), first, bag, 0
    )
    return grad.view(bags, rows)
