"""The one primitive: some rows of a table, with weights, summed.

Deformable convolution, RoIAlign and deformable attention read feature maps at fractional
positions. With the map laid out as a table of rows (channels last), a bilinear sample is four rows
with four weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import check_tensor

__all__ = ["add_table_gradient", "weight_gradient", "weighted_gather"]

NARROW = 64  # channels up to which PyTorch's operator takes longer than a copy of the rows
GATHERED = 2**19  # elements copied at a time: two megabytes of float32


def weighted_gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums chosen rows of a table with weights: out[m] = Σ_j weight[m, j] · table[index[m, j]].

    Sums are taken in float32 or wider and rounded to the table's dtype, as are the weights.
    Differentiable in the table and the weights; but a table's gradients are added up in its dtype,
    and bfloat16 loses most of them where many rows meet. `add_table_gradient` does not.

    Args:
        table: (N, C) floating point.
        index: (M, J) integers in [0, N).
        weight: (M, J) floating point.

    Returns:
        (M, C) in the table's dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    check_tensor("weighted_gather: table", table, ("N", "C"))
    check_tensor("weighted_gather: index", index, ("M", "J"), table.device, integer=True)
    check_tensor("weighted_gather: weight", weight, tuple(index.shape), table.device)
    if index.shape[0] == 0:
        return table.new_zeros((0, table.shape[1])) + 0 * table[:0].sum()
    with torch.autocast(table.device.type, enabled=False):
        return F.embedding_bag(index, table, per_sample_weights=weight.to(table.dtype), mode="sum")


def add_table_gradient(grad_table: Tensor, grad_out: Tensor, index: Tensor, weight: Tensor) -> None:
    """Adds the gradient of `weighted_gather`'s table, in an order that is always the same.

    It is a gather itself: of each row of the table, from the results that it went into.

    Args:
        grad_table: (N, C) in float32 or wider, added to.
        grad_out: (M, C).
        index, weight: as given to `weighted_gather`, M at least 1.
    """
    first, end = 0, grad_table.shape[0]
    if index.device.type == "cpu":  # where looking is no stall: results near one another share rows
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
    """Gradient of `weighted_gather`'s weights, (M, J) in float32 or wider.

    Args:
        grad_out: (M, C).
        table, index: as given to `weighted_gather`, M at least 1.
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
