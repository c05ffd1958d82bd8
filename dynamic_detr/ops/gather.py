"""The one primitive: some rows of a table, with weights, summed.

Deformable convolution and RoIAlign read feature maps at fractional positions. With the map laid
out as a table of rows (channels last), a bilinear sample is four rows with four weights; that
arithmetic is here, and nowhere else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bilinear_corners",
    "bilinear_corners_backward",
    "weighted_gather",
    "weighted_gather_backward",
]


def weighted_gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sums chosen rows of a table with weights: out[m] = Σ_j weight[m, j] · table[index[m, j]].

    Differentiable in the table and the weights. Gather and gradients run in float32, because
    gradients accumulate in the table's dtype and bfloat16 loses most of them where many rows
    meet; the result has the table's dtype.

    Args:
        table: (N, C) floating point.
        index: (M, J) integers in [0, N).
        weight: (M, J) floating point.

    Returns:
        (M, C) in the table's dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    if table.dim() != 2:
        raise ValueError(f"weighted_gather: table has shape {tuple(table.shape)}; wants (N, C).")
    if index.dim() != 2 or index.shape != weight.shape:
        raise ValueError(
            f"weighted_gather: index {tuple(index.shape)} and weight {tuple(weight.shape)} "
            "must both be (M, J)."
        )
    if index.shape[0] == 0:
        return table.new_zeros((0, table.shape[1])) + 0 * table[:0].sum()
    dtype = torch.promote_types(table.dtype, torch.float32)
    with torch.autocast(table.device.type, enabled=False):
        rows = F.embedding_bag(
            index, table.to(dtype), per_sample_weights=weight.to(dtype), mode="sum"
        )
    return rows.to(table.dtype)


def weighted_gather_backward(
    grad_out: Tensor,
    table: Tensor,
    index: Tensor,
    weight: Tensor,
    needs_table: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `weighted_gather`, for operators whose backward pass is not recorded.

    Args:
        grad_out: (M, C).
        table, index, weight: as given to `weighted_gather`, M at least 1.
        needs_table, needs_weight: which gradients to compute.

    Returns:
        Gradient of the table (N, C) and of the weights (M, J), in float32 or wider; None for one
        that is not needed.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    grad_out = grad_out.to(dtype).contiguous()
    bags, rows = index.shape
    index = index.flatten()
    bag = torch.arange(bags, device=index.device, dtype=index.dtype).repeat_interleave(rows)
    grad_table = grad_weight = None
    if needs_table:
        unused = index[:0]  # asked for by the mean and the maximum
        grad_table = torch.ops.aten._embedding_bag_dense_backward(
            *(grad_out, index, bag, unused, unused, table.shape[0], False, 0),
            weight.to(dtype).flatten(),
        )
    if needs_weight:
        first = torch.arange(0, bags * rows, rows, device=index.device, dtype=index.dtype)
        grad_weight = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_out, table.to(dtype), index, first, bag, 0
        ).view(bags, rows)
    return grad_table, grad_weight


def bilinear_corners(
    y: Tensor, x: Tensor, height: Tensor | int, width: Tensor | int, row_length: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The four neighbours of fractional positions, and their bilinear weights.

    Neighbours outside [0, height) × [0, width) get weight 0 (and an index inside), which is a
    map surrounded by zeros. Positions that are not finite get weight NaN or 0 and an index
    inside.

    Args:
        y, x: positions in pixels, integer at the centre of a pixel, any shape, float32 or wider.
        height, width: size of the map, numbers or integer tensors that broadcast to the shape.
        row_length: number of columns by which a step in y moves in the table.

    Returns:
        index (..., 4) int32 relative to the first row of the map, weight (..., 4) in y's dtype.
    """
    rows, weight_y, _ = _neighbours(y, height)
    columns, weight_x, _ = _neighbours(x, width)
    weight = weight_y[..., :, None] * weight_x[..., None, :]
    if isinstance(row_length, Tensor):
        row_length = row_length[..., None]
    index = (rows * row_length)[..., :, None] + columns[..., None, :]
    return index.flatten(-2), weight.flatten(-2)


def bilinear_corners_backward(
    grad_weight: Tensor, y: Tensor, x: Tensor, height: Tensor | int, width: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Gradients of the positions from those of their bilinear weights.

    Args:
        grad_weight: (..., 4), of the weights that `bilinear_corners` returned.
        y, x, height, width: as given to it.

    Returns:
        Gradients of y and x, in their shape. On a pixel, where the gradient jumps, it is that of
        the cell below and right of it.
    """
    _, weight_y, slope_y = _neighbours(y, height)
    _, weight_x, slope_x = _neighbours(x, width)
    grad = grad_weight.unflatten(-1, (2, 2))
    grad_y = (grad * slope_y[..., :, None] * weight_x[..., None, :]).sum(dim=(-2, -1))
    grad_x = (grad * weight_y[..., :, None] * slope_x[..., None, :]).sum(dim=(-2, -1))
    return grad_y, grad_x


def _neighbours(position: Tensor, size: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Index, weight and derivative of the weight of the two neighbours on one axis: (..., 2)."""
    first = position.detach().floor()
    fraction = position - first
    neighbours = torch.stack([first, first + 1], dim=-1)
    size = size[..., None] if isinstance(size, Tensor) else size
    inside = ((neighbours >= 0) & (neighbours < size)).to(position.dtype)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside
    slope = torch.stack([-inside[..., 0], inside[..., 1]], dim=-1)
    return _clamp_index(neighbours, size), weight, slope


def _clamp_index(index: Tensor, size: Tensor | int) -> Tensor:
    index = torch.nan_to_num(index, nan=0.0, posinf=0.0, neginf=0.0)
    if isinstance(size, Tensor):
        return torch.minimum(index.clamp(min=0), (size - 1).to(index.dtype)).to(torch.int32)
    return index.clamp(0, size - 1).to(torch.int32)
