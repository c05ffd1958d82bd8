"""Bilinear samples of a map that zeros surround: which four pixels, with which weights, and the
gradients of the positions. Axis by axis, in operations on whole tensors, none of which masks."""

import torch
from torch import Tensor

__all__ = ["BilinearSamples"]

NOWHERE = -2.0  # a pixel's position no neighbour of which is on the map


class BilinearSamples:
    """Samples at fractional positions, each the weighted sum of four pixels.

    Pixels outside [0, height) × [0, width) get weight 0 (and an index inside). Positions that are
    not finite are outside.

    Args:
        y, x: positions in pixels, integer at the centre of a pixel, float32 or wider; their shapes
            broadcast.
        height, width: size of the map, at least 1, numbers or integer tensors that broadcast with
            the position.
        scale: a factor of each sample, in the broadcast shape of y and x; None for one.
    """

    def __init__(
        self,
        y: Tensor,
        x: Tensor,
        height: Tensor | int,
        width: Tensor | int,
        scale: Tensor | None = None,
    ) -> None:
        self.rows, self.columns = _Neighbours(y, height), _Neighbours(x, width)
        self.scale = scale
        self.shape = torch.broadcast_shapes(y.shape, x.shape)

    def index(self, row_length: Tensor | int) -> Tensor:
        """Where the four pixels are, (..., 4) int32, in a table of the map's pixels row by row.

        Args:
            row_length: pixels in a row of the table; as `width`, and at least as many.
        """
        index = self.rows.low.new_empty((*self.shape, 4))
        for i, row in enumerate((self.rows.low, self.rows.high)):
            first = (row * row_length).to(torch.int32)
            for j, column in enumerate((self.columns.low, self.columns.high)):
                torch.add(first, column, out=index[..., 2 * i + j])
        return index

    def weight(self) -> Tensor:
        """What each of the four contributes, (..., 4)."""
        weight = self.rows.distance.new_empty((*self.shape, 4))
        for i, row_weight in enumerate(self.rows.weights):
            if self.scale is not None:
                row_weight = row_weight * self.scale
            for j, column_weight in enumerate(self.columns.weights):
                torch.mul(row_weight, column_weight, out=weight[..., 2 * i + j])
        return weight

    def backward(self, grad_weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of y, x and scale (None without one) from those of the weights (..., 4).

        On a pixel, where the gradient of a position jumps, it is that of the cell below and right
        of it. Wants positions of the broadcast shape.
        """
        upper_left, upper_right, lower_left, lower_right = grad_weight.unbind(dim=-1)
        (top, bottom), (left, right) = self.rows.weights, self.columns.weights
        grad_top = upper_left * left + upper_right * right
        grad_bottom = lower_left * left + lower_right * right
        grad_left = upper_left * top + lower_left * bottom
        grad_right = upper_right * top + lower_right * bottom
        grad_y = self.rows.backward(grad_top, grad_bottom)
        grad_x = self.columns.backward(grad_left, grad_right)
        if self.scale is None:
            return grad_y, grad_x, None
        grad_scale = grad_top * top + grad_bottom * bottom
        return grad_y * self.scale, grad_x * self.scale, grad_scale


class _Neighbours:
    """Two neighbouring pixels on one axis, such that no pixel but these touches the position.

    Where the map ends they are its last two, though the position is beyond. A pixel's weight is
    1 - |distance|, and 0 further than 1 away.
    """

    def __init__(self, position: Tensor, size: Tensor | int) -> None:
        position = _clamp(torch.nan_to_num(position, nan=NOWHERE), NOWHERE, size + 1)
        first = _clamp(position.floor(), 0.0, _at_least_0(size - 2))
        self.distance = position - first  # from the first; in [-2, 3]
        self.low = first.to(torch.int32)
        self.high = _clamp(self.low + 1, 0, size - 1)
        self.weights = _tent(self.distance), _tent(self.distance - 1)
        self.is_pair = size > 1
        if self.is_pair is not True:
            self.weights[1].mul_(self.is_pair)

    def backward(self, grad_low: Tensor, grad_high: Tensor) -> Tensor:
        """Gradient of the position from those of the weights."""
        cell = self.distance.floor()  # -1: before the first, 0: between them, 1: behind the second
        before, between, behind = (_tent(cell - number) for number in (-1, 0, 1))
        slope_low, slope_high = before.sub_(between), between - behind
        if self.is_pair is not True:
            slope_high.mul_(self.is_pair)
        return grad_low * slope_low + grad_high * slope_high


def _tent(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_(min=0)


def _clamp(values: Tensor, low: float, high: Tensor | int) -> Tensor:
    if isinstance(high, Tensor):
        return torch.minimum(values.clamp(min=low), high.to(values.dtype))
    return values.clamp(low, high)


def _at_least_0(number: Tensor | int) -> Tensor | int:
    return number.clamp(min=0) if isinstance(number, Tensor) else max(number, 0)
