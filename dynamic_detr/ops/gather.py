"""The one primitive: some rows of a table, with weights, summed.

Deformable convolution and RoIAlign read feature maps at fractional positions. With the map laid
out as a table of rows (channels last), a bilinear sample is four rows with four weights; that
arithmetic is here, and nowhere else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bilinear_corners", "weighted_gather"]


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
    y0, x0 = y.detach().floor(), x.detach().floor()
    fraction_y, fraction_x = y - y0, x - x0
    rows = torch.stack([y0, y0 + 1], dim=-1)  # (..., 2)
    columns = torch.stack([x0, x0 + 1], dim=-1)
    weight_y = torch.stack([1 - fraction_y, fraction_y], dim=-1)
    weight_x = torch.stack([1 - fraction_x, fraction_x], dim=-1)
    height, width, row_length = (
        s[..., None] if isinstance(s, Tensor) else s for s in (height, width, row_length)
    )
    weight_y = weight_y * ((rows >= 0) & (rows < height))
    weight_x = weight_x * ((columns >= 0) & (columns < width))
    weight = weight_y[..., :, None] * weight_x[..., None, :]
    rows = _clamp_index(rows, height)
    columns = _clamp_index(columns, width)
    index = (rows * row_length)[..., :, None] + columns[..., None, :]
    return index.flatten(-2), weight.flatten(-2)


def _clamp_index(index: Tensor, size: Tensor | int) -> Tensor:
    index = torch.nan_to_num(index, nan=0.0, posinf=0.0, neginf=0.0)
    if isinstance(size, Tensor):
        return torch.minimum(index.clamp(min=0), (size - 1).to(index.dtype)).to(torch.int32)
    return index.clamp(0, size - 1).to(torch.int32)
