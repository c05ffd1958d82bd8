"""Bilinear sampling with zero padding: indices and weights of the four pixels, and gradients of the
positions. Each axis is computed separately, without boolean masks."""

import torch
from torch import Tensor

__all__ = ["BilinearSamples"]

OUTSIDE = -2.0  # a position whose neighbours are all outside the map


class BilinearSamples:
    """Bilinear samples at fractional positions, each a weighted sum of four pixels.

    Pixels outside [0, height) × [0, width) get weight 0 and an index inside. Samples at positions
    that are not finite are zero.

    Args:
        y, x: positions in pixels, integers at pixel centres, float32 or wider; their shapes
            broadcast.
        height, width: size of the map, at least 1; numbers, or integer tensors that broadcast with
            the positions.
        scale: factor of each sample, in the broadcast shape of y and x; None for 1.
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
        """Return the indices of the four pixels in the flattened map, (..., 4) int32.

        Args:
            row_length: pixels per row of the flattened map, at least `width`.
        """
        index = self.rows.low.new_empty((*self.shape, 4))
        for i, row in enumerate((self.rows.low, self.rows.high)):
            first = (row * row_length).to(torch.int32)
            for j, column in enumerate((self.columns.low, self.columns.high)):
                torch.add(first, column, out=index[..., 2 * i + j])
        return index

    def weight(self) -> Tensor:
        """Return the weights of the four pixels, (..., 4)."""
        weight = self.rows.distance.new_empty((*self.shape, 4))
        for i, row_weight in enumerate(self.rows.weights):
            if self.scale is not None:
                row_weight = row_weight * self.scale
            for j, column_weight in enumerate(self.columns.weights):
                torch.mul(row_weight, column_weight, out=weight[..., 2 * i + j])
        return weight

    def backward(self, grad_weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of y, x and scale from the gradient of the weights (..., 4).

        The gradient of scale is None if there is no scale. At an integer position, where the
        derivative jumps, it is that of the cell below and to the right. y and x must have the
        broadcast shape.
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
    """The two pixels of an axis that contribute to a position, or the nearest two at an edge.

    The weight of a pixel is max(0, 1 - |distance|).
    """

    def __init__(self, position: Tensor, size: Tensor | int) -> None:
        position = _clamp(torch.nan_to_num(position, nan=OUTSIDE), OUTSIDE, size + 1)
        first = _clamp(position.floor(), 0.0, _at_least_0(size - 2))
        self.distance = position - first  # from the first pixel; in [-2, 3]
        self.low = first.to(torch.int32)
        self.high = _clamp(self.low + 1, 0, size - 1)
        self.weights = _tent(self.distance), _tent(self.distance - 1)
        self.is_pair = size > 1
        if self.is_pair is not True:
            self.weights[1].mul_(self.is_pair)

    def backward(self, grad_low: Tensor, grad_high: Tensor) -> Tensor:
        """Return the gradient of the position from the gradients of the two weights."""
        cell = self.distance.floor()  # -1: before the first, 0: between them, 1: after the second
        before, between, after = (_tent(cell - number) for number in (-1, 0, 1))
        slope_low, slope_high = before.sub_(between), between - after
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
