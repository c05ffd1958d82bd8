"""The maps of a level for plain PyTorch, band by band: rows of an image, few enough to stay in a
CPU's cache, or some whole images where these are small, and the rows of the coarser neighbour
between which they lie.

A part is what a band holds of a map: (images, rows, W, C), in float32 (float64 for float64 maps).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Band", "add_upsampled_gradient", "bands", "covered", "half", "upsampled"]

NUMBERS = 2**18  # in a part: a megabyte of float32


class Band(NamedTuple):
    """Some rows of one image, or of neighbours of the same true size."""

    images: slice
    rows: slice
    size: Tensor  # (2,), the true height and width of each
    valid: Tensor | None  # (rows, W, 1), which pixels are true; None where all are known to be

    def read(self, features: Tensor) -> Tensor:
        """The part of (B, C, H, W) features, zero beyond the true size; it may be a view."""
        part = features.permute(0, 2, 3, 1)[self.images, self.rows]
        return self.masked(part.to(torch.promote_types(part.dtype, torch.float32)))

    def masked(self, part: Tensor) -> Tensor:
        """Zero beyond the true size."""
        return part if self.valid is None else torch.where(self.valid, part, 0)

    def write(self, features: Tensor, part: Tensor) -> None:
        """Stores the part in (B, C, H, W) features, with zeros beyond the true size."""
        features.permute(0, 2, 3, 1)[self.images, self.rows] = self.masked(part)


def bands(features: Tensor, sizes: Tensor) -> Iterator[Band]:
    """All rows of (B, C, H, W) features, whose true sizes are (B, 2).

    Only on the CPU are they cut small, and sizes looked at: elsewhere that would be a stall.
    """
    batch, channels, height, width = features.shape
    on_cpu = features.device.type == "cpu"
    known = sizes.tolist() if on_cpu else None
    length = max(1, NUMBERS // max(1, width * channels)) if on_cpu else height
    together = max(1, length // max(1, height)) if on_cpu else 1
    columns = torch.arange(width, device=features.device)
    first = 0
    while first < batch:
        last = first + 1
        while last < min(first + together, batch) and known[last] == known[first]:
            last += 1
        h, w = known[first] if on_cpu else sizes[first].unbind()
        for top in range(0, height, length):
            rows = slice(top, min(top + length, height))
            valid = None
            if not (on_cpu and rows.stop <= h and width <= w):
                row = torch.arange(rows.start, rows.stop, device=features.device)
                valid = ((row < h)[:, None] & (columns < w))[..., None]
            yield Band(slice(first, last), rows, sizes[first], valid)
        first = last


def half(sizes: Tensor) -> Tensor:
    """True sizes of the coarser neighbour."""
    return (sizes + 1) // 2


def covered(band: Band, coarser: Tensor, sizes: Tensor) -> Tensor:
    """How many true pixels of the level, of true sizes (B, 2), each pixel of a band of the coarser
    map covers: (images, rows, W', 1). Images of one size there may differ by a pixel here.

    It is also the sum of the weights with which the level reads it: ¼ + ¾ + ¾ + ¼ in each
    direction, where at an edge what a pixel loses on one side it gains by being continued.
    """
    height, width = sizes[band.images, None].unbind(dim=-1)  # (images, 1)
    row = torch.arange(band.rows.start, band.rows.stop, device=coarser.device)
    column = torch.arange(coarser.shape[-1], device=coarser.device)
    tall, wide = (height - 2 * row).clamp(0, 2), (width - 2 * column).clamp(0, 2)
    pixels = tall[:, :, None] * wide[:, None]
    return pixels[..., None].to(torch.promote_types(coarser.dtype, torch.float32))


def upsampled(band: Band, width: int, coarser: Tensor) -> Tensor:
    """The part of the upsampled coarser map in a band of the level, which is `width` wide."""
    rows, columns = _interpolations(band, width)
    pixels = coarser.permute(0, 2, 3, 1)[band.images]
    return columns.read(rows.read(pixels, dim=1), dim=2)


def add_upsampled_gradient(band: Band, grad: Tensor, coarser_grad: Tensor) -> None:
    """The adjoint of `upsampled`: adds the gradient of its result to (images, H', W', C), that of
    the coarser map of the same images."""
    rows, columns = _interpolations(band, grad.shape[2])
    narrow = grad.new_zeros((*grad.shape[:2], *coarser_grad.shape[2:]))
    columns.add_gradient(grad, narrow, dim=2)
    rows.add_gradient(narrow, coarser_grad, dim=1)


class _Interpolation(NamedTuple):
    """Between which rows (or columns) of the coarser map those of the level lie."""

    low: Tensor
    high: Tensor
    weight: Tensor  # float32, of the low one; the high one has the rest

    def _weight(self, dim: int) -> Tensor:
        return self.weight[:, None, None] if dim == 1 else self.weight[:, None]

    def read(self, pixels: Tensor, dim: int) -> Tensor:
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        low = pixels.index_select(dim, self.low).to(dtype)
        high = pixels.index_select(dim, self.high).to(dtype)
        return high.lerp_(low, self._weight(dim).to(dtype))

    def add_gradient(self, grad: Tensor, pixels_grad: Tensor, dim: int) -> None:
        to_low = grad * self._weight(dim)
        pixels_grad.index_add_(dim, self.low, to_low)
        pixels_grad.index_add_(dim, self.high, grad - to_low)


def _interpolations(band: Band, width: int) -> tuple[_Interpolation, _Interpolation]:
    """Of the rows of a band and of its columns, moved to the true edge where they are beyond."""

    def interpolation(first: int, end: int, true_length: Tensor) -> _Interpolation:
        position = torch.arange(first, end, device=band.size.device)
        last = half(true_length) - 1
        low = (position + 1) // 2 - 1
        weight = 0.25 + 0.5 * (position % 2)
        return _Interpolation(low.clamp(min=0).minimum(last), (low + 1).minimum(last), weight)

    height, true_width = band.size.unbind()
    return (
        interpolation(band.rows.start, band.rows.stop, height),
        interpolation(0, width, true_width),
    )
