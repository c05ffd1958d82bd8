"""Tiles of a feature map for `fuse_levels`, and upsampling of the coarser neighbour within a tile.

A tile consists of true pixels: some rows of an image, few enough for the cache of a CPU, or several
whole images if they are small. The part of a map in a tile is (images, rows, columns, C), float32
or wider.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Tile", "add_upsampled_gradient", "tiles", "half", "result", "upsampled"]

ELEMENTS = 2**19  # of a part: 2 MiB of float32


class Tile(NamedTuple):
    """Rows of one image, or of consecutive images of the same true size.

    Args:
        images: range of images.
        rows: range of rows; the first is even.
        columns: range of columns, from 0.
        size: true height and width of each image.
        valid: (rows, columns, 1) bool mask of true pixels; None if all are true.
    """

    images: slice
    rows: slice
    columns: slice
    size: tuple[int, int] | tuple[Tensor, Tensor]
    valid: Tensor | None

    def read(self, features: Tensor) -> Tensor:
        """Return the part of (B, C, H, W) features, zero beyond the true size; may be a view."""
        part = self._of(features)
        return self.masked(part.to(torch.promote_types(part.dtype, torch.float32)))

    def masked(self, part: Tensor) -> Tensor:
        """Return the part with zeros beyond the true size."""
        return part if self.valid is None else torch.where(self.valid, part, 0)

    def target(self, features: Tensor, like: Tensor) -> Tensor:
        """Return a buffer for a part like `like`: the view of (B, C, H, W) features if the dtypes
        agree, else a new tensor."""
        part = self._of(features)
        return part if part.dtype == like.dtype else torch.empty_like(like)

    def write(self, features: Tensor, part: Tensor) -> None:
        """Write the part to (B, C, H, W) features, zero beyond the true size."""
        stored, part = self._of(features), self.masked(part)
        if stored.data_ptr() != part.data_ptr():
            stored.copy_(part)

    def _of(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)[self.images, self.rows, self.columns]


def tiles(features: Tensor, sizes: Tensor) -> Iterator[Tile]:
    """Split the true pixels of (B, C, H, W) features with true sizes (B, 2) into tiles.

    On a GPU, reading the sizes would synchronise, so a tile there is a whole image with a mask.
    """
    batch, channels, height, width = features.shape
    if features.device.type != "cpu":
        for image, size in enumerate(sizes):
            row, column = (torch.arange(n, device=features.device) for n in (height, width))
            valid = ((row < size[0])[:, None] & (column < size[1]))[..., None]
            pixels = slice(image, image + 1), slice(0, height), slice(0, width)
            yield Tile(*pixels, tuple(size), valid)
        return
    known = [tuple(size) for size in sizes.tolist()]
    first = 0
    while first < batch:
        true_height, true_width = size = known[first]
        length = max(2, ELEMENTS // max(1, true_width * channels) // 2 * 2)
        last = first + 1
        together = max(1, length // max(1, true_height))
        while last < min(first + together, batch) and known[last] == size:
            last += 1
        for top in range(0, true_height, length):
            rows = slice(top, min(top + length, true_height))
            yield Tile(slice(first, last), rows, slice(0, true_width), size, None)
        first = last


def result(features: Tensor, sizes: Tensor) -> Tensor:
    """Return an empty map like (B, C, H, W) features, with zeros where no tile writes."""
    out = torch.empty_like(features, memory_format=torch.channels_last)
    if features.device.type == "cpu":
        for image, (height, width) in zip(out, sizes.tolist(), strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
    return out


def half(sizes: Tensor) -> Tensor:
    """Return the true sizes of the coarser neighbour."""
    return (sizes + 1) // 2


def upsampled(tile: Tile, coarser: Tensor) -> Tensor:
    """Return the part of the upsampled coarser map (B, C, H', W') in a tile of the level.

    Bilinear by a factor of 2 with align_corners=False; edges of the true map are replicated.
    """
    rows, columns = _framed(tile, coarser)
    pixels = coarser.permute(0, 2, 3, 1)[tile.images].index_select(1, rows).index_select(2, columns)
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    doubled = _double(_double(pixels, dim=1), dim=2)
    return doubled[:, : tile.rows.stop - tile.rows.start, : tile.columns.stop]


def add_upsampled_gradient(tile: Tile, grad: Tensor, coarser_grad: Tensor) -> None:
    """Add the gradient of `upsampled` to the gradient (B, C, H', W') of the coarser map."""
    rows, columns = _framed(tile, coarser_grad)
    framed = _halve(_halve(grad, dim=2), dim=1)
    images = coarser_grad.permute(0, 2, 3, 1)[tile.images]
    framed = framed.new_zeros((*framed.shape[:2], *images.shape[2:])).index_add_(2, columns, framed)
    images.index_add_(1, rows, framed)


def _framed(tile: Tile, coarser: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the coarser map under a tile, plus one on each side."""

    def indices(pixels: slice, length: int | Tensor) -> Tensor:
        index = torch.arange(
            pixels.start // 2 - 1, (pixels.stop + 1) // 2 + 1, device=coarser.device
        )
        return index.clamp(min=0).clamp(max=(length + 1) // 2 - 1)

    return indices(tile.rows, tile.size[0]), indices(tile.columns, tile.size[1])


def _double(pixels: Tensor, dim: int) -> Tensor:
    """Return two pixels for each pixel but the first and the last."""
    count = pixels.shape[dim] - 2
    before, here, after = (pixels.narrow(dim, start, count) for start in range(3))
    doubled = pixels.new_empty((*here.shape[: dim + 1], 2, *here.shape[dim + 1 :]))
    torch.lerp(here, before, 0.25, out=doubled.select(dim + 1, 0))
    torch.lerp(here, after, 0.25, out=doubled.select(dim + 1, 1))
    return doubled.flatten(dim, dim + 1)


def _halve(grad: Tensor, dim: int) -> Tensor:
    """Return the adjoint of `_double`; an odd number of pixels lacks the last."""
    if grad.shape[dim] % 2:
        grad = F.pad(grad, [0] * (2 * (grad.dim() - 1 - dim)) + [0, 1])
    first, second = grad.unflatten(dim, (-1, 2)).unbind(dim + 1)
    count = first.shape[dim]
    shape = list(first.shape)
    shape[dim] = count + 2
    pixels = grad.new_zeros(shape)
    before, here, after = (pixels.narrow(dim, start, count) for start in range(3))
    torch.add(first, second, out=here).mul_(0.75)
    before.add_(first, alpha=0.25)
    after.add_(second, alpha=0.25)
    return pixels
