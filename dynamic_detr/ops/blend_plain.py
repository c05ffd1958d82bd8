"""`masked_moments` and `blend_dyrelu` in plain PyTorch, in pieces that stay in cache.

Letters: h, w the true size of an image on a map of H × W pixels. A piece is a band of true rows of
one image, seen as (rows, w, C) in float32 (float64 for float64 maps).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blend", "coefficient_gradients", "map_gradients", "moments"]

PIECE = 2**18  # numbers of a map in a piece: a megabyte of float32


class Piece(NamedTuple):
    """Where a band of rows lies.

    On the CPU it ends at the true edge. Elsewhere sizes cannot be read without a stall: it is a
    whole image, and `valid` (H, W, 1) says which pixels are true.
    """

    image: int
    rows: slice  # starting at an even row
    columns: slice
    height: int | Tensor  # true size of the image
    width: int | Tensor
    valid: Tensor | None

    def of(self, features: Tensor) -> Tensor:
        """This piece of (B, C, H, W) features, with zeros beyond the true edge."""
        part = features.permute(0, 2, 3, 1)[self.image, self.rows, self.columns]
        return self.masked(part.to(torch.promote_types(part.dtype, torch.float32)))

    def masked(self, part: Tensor) -> Tensor:
        return part if self.valid is None else torch.where(self.valid, part, 0)

    def write(self, features: Tensor, part: Tensor) -> None:
        """Stores a part in (B, C, H, W) features."""
        features.permute(0, 2, 3, 1)[self.image, self.rows, self.columns] = self.masked(part)

    def count(self) -> int | Tensor:
        """The number of true pixels in it."""
        if self.valid is not None:
            return self.height * self.width
        return (self.rows.stop - self.rows.start) * self.width


def pieces(features: Tensor, sizes: Tensor) -> Iterator[Piece]:
    """All true pixels of (B, C, H, W) features."""
    _, channels, height, width = features.shape
    if features.device.type == "cpu":
        band = max(2, PIECE // max(channels * width, 1) // 2 * 2)
        for image, (h, w) in enumerate(sizes.tolist()):
            for row in range(0, h, band):
                yield Piece(image, slice(row, min(row + band, h)), slice(0, w), h, w, None)
        return
    h, w = sizes.unbind(dim=1)
    rows = torch.arange(height, device=features.device) < h[:, None]
    columns = torch.arange(width, device=features.device) < w[:, None]
    valid = (rows[:, :, None] & columns[:, None, :])[..., None]  # (B, H, W, 1)
    for image in range(len(sizes)):
        whole = slice(0, height), slice(0, width)
        yield Piece(image, *whole, h[image], w[image], valid[image])


def half(sizes: Tensor) -> Tensor:
    """True sizes of the coarser map."""
    return (sizes + 1) // 2


def within(sizes: Tensor, features: Tensor) -> Tensor:
    """True sizes, where an image may claim to be larger than its map."""
    height, width = features.shape[-2:]
    return torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], dim=1)


def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """(3, 3, B, C): see `masked_moments`."""
    sizes = within(sizes, same)
    dtype = torch.promote_types(same.dtype, torch.float32)
    out = same.new_zeros((3, 3, *same.shape[:2]), dtype=dtype)
    for index, features in enumerate((same, finer)):
        if features is not None:
            _measure(features, sizes, out[0, index], out[1, index])
            out[2, index] = out[0, index]
    if coarser is not None:
        _measure(coarser, half(sizes), *out[:, 2], sizes)
    return out


def _measure(features, sizes, mean, variance, upsampled_mean=None, level_sizes=None) -> None:
    """Writes (B, C) mean and variance, and the mean of the upsampled map over the level."""
    counts = [0] * len(sizes)
    for piece in pieces(features, sizes):
        image, part, count = piece.image, piece.of(features), piece.count()
        part_mean = part.sum(dim=(0, 1)) / count
        if upsampled_mean is not None:
            covered = _covered(piece, features, level_sizes[image])
            total = torch.einsum("hw,hwc->c", covered.to(part.dtype), part)
            upsampled_mean[image] += total / level_sizes[image].prod()
        squares = piece.masked(part - part_mean).square_().sum(dim=(0, 1))
        # Chan's rule
        before, counts[image] = counts[image], counts[image] + count
        delta = part_mean - mean[image]
        mean[image] += delta * (count / counts[image])
        variance[image] += squares + delta.square() * (before * count / counts[image])
    for image, count in enumerate(counts):
        variance[image] /= count


def _covered(piece: Piece, features: Tensor, level_size: Tensor) -> Tensor:
    """How many true pixels of the level each coarse pixel of the piece covers: (rows, w).

    It is also the sum of the weights with which they read it: ¼ + ¾ + ¾ + ¼ in each direction,
    where at a border what a pixel loses on one side it gains by being continued.
    """
    height, width = features.shape[-2:]
    rows = torch.arange(height, device=features.device)[piece.rows]
    columns = torch.arange(width, device=features.device)[piece.columns]
    tall = (level_size[0] - 2 * rows).clamp(0, 2)
    wide = (level_size[1] - 2 * columns).clamp(0, 2)
    return tall[:, None] * wide


def _slab(piece: Piece, coarser: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the coarser map around a piece of the level, clamped to its true
    edge: one row above, one below."""
    height, width = coarser.shape[-2:]
    device = coarser.device
    rows = torch.arange(piece.rows.start // 2 - 1, (piece.rows.stop + 1) // 2 + 1, device=device)
    columns = torch.arange((piece.columns.stop + 1) // 2, device=device)
    last_row, last_column = (piece.height + 1) // 2 - 1, (piece.width + 1) // 2 - 1
    return rows.clamp(min=0).clamp(max=last_row), columns.clamp(max=last_column)


def _upsampled(piece: Piece, coarser: Tensor) -> Tensor:
    """The piece (rows, w, C) of the upsampled coarser map."""
    rows, columns = _slab(piece, coarser)
    slab = coarser.permute(0, 2, 3, 1)[piece.image].index_select(0, rows)[:, : len(columns)]
    if piece.valid is not None:
        slab = slab.index_select(1, columns)
    slab = slab.to(torch.promote_types(slab.dtype, torch.float32))
    slab = F.interpolate(slab.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear")
    height, width = piece.rows.stop - piece.rows.start, piece.columns.stop
    return slab[0].permute(1, 2, 0)[2 : 2 + height, :width]


def _add_upsampled_gradient(piece: Piece, grad: Tensor, coarser_grad: Tensor) -> None:
    """The adjoint of `_upsampled`: adds to the coarser map's gradient (B, H', W', C)."""
    rows, columns = _slab(piece, coarser_grad.permute(0, 3, 1, 2))
    height, width, channels = grad.shape
    up = grad.new_zeros((2 * len(rows), 2 * len(columns), channels))
    up[2 : 2 + height, :width] = grad
    slab = torch.ops.aten.upsample_bilinear2d_backward(
        up.permute(2, 0, 1)[None],
        up.shape[:2],
        (1, channels, len(rows), len(columns)),
        False,
        2.0,
        2.0,
    )[0].permute(1, 2, 0)
    if piece.valid is not None:
        slab = torch.zeros_like(slab).index_add_(1, columns, slab)
    coarser_grad[piece.image][:, : len(columns)].index_add_(0, rows, slab)


def _parts(piece: Piece, same, finer, coarser) -> list[tuple[int, Tensor]]:
    """The maps that there are, with their numbers."""
    parts = [(0, piece.of(same))]
    if finer is not None:
        parts.append((1, piece.of(finer)))
    if coarser is not None:
        parts.append((2, _upsampled(piece, coarser)))
    return parts


def _sum(parts: list[tuple[int, Tensor]], coefficients: Tensor) -> Tensor:
    total = parts[0][1] * coefficients[0]
    for index, part in parts[1:]:
        total.addcmul_(part, coefficients[index])
    return total


def blend(same, finer, coarser, sizes: Tensor, coefficients: Tensor) -> Tensor:
    """(B, C, H, W): see `blend_dyrelu`."""
    sizes = within(sizes, same)
    out = _empty(same, sizes)
    for piece in pieces(same, sizes):
        own = coefficients[:, piece.image]
        a1, b1, a2, b2 = own[3:]
        x = _sum(_parts(piece, same, finer, coarser), own)
        first = torch.addcmul(b1, x, a1)
        second = x.mul_(a2).add_(b2)
        piece.write(out, torch.maximum(first, second, out=first))
    return out


def _empty(features: Tensor, sizes: Tensor) -> Tensor:
    """Channels last, not initialised but for zeros where no piece will be written."""
    out = torch.empty_like(features, memory_format=torch.channels_last)
    if features.device.type == "cpu":
        for image, (height, width) in enumerate(sizes.tolist()):
            out[image, :, height:] = 0
            out[image, :, :height, width:] = 0
    return out


def _upstream(
    piece: Piece, parts: list, grad_out: Tensor, own: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum x, the gradients of the two lines' values, and that of x.

    Where the lines meet each gets half, as `torch.maximum` has it.
    """
    a1, b1, a2, b2 = own[3:]
    x = _sum(parts, own)
    grad = piece.of(grad_out)
    above = torch.addcmul(b1 - b2, x, a1 - a2).sign_().add_(1).mul_(0.5)
    first = above.mul_(grad)
    second = grad - first
    return x, first, second, torch.addcmul(first * a1, second, a2)


def coefficient_gradients(grad_out, same, finer, coarser, sizes, coefficients: Tensor) -> Tensor:
    """(7, B, C): the gradients of the coefficients of `blend_dyrelu`."""
    sizes = within(sizes, same)
    grads = torch.zeros_like(coefficients)
    for piece in pieces(same, sizes):
        parts = _parts(piece, same, finer, coarser)
        x, first, second, grad_x = _upstream(piece, parts, grad_out, coefficients[:, piece.image])
        sums = grads[:, piece.image]
        for index, part in parts:
            sums[index] += (grad_x * part).sum(dim=(0, 1))
        sums[4] += first.sum(dim=(0, 1))
        sums[6] += second.sum(dim=(0, 1))
        sums[3] += first.mul_(x).sum(dim=(0, 1))
        sums[5] += second.mul_(x).sum(dim=(0, 1))
    return grads


def map_gradients(
    same, finer, coarser, sizes, moments, grad_moments, grad_out, coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the maps, through their moments and, unless `grad_out` is None, through
    `blend_dyrelu`; empty where there is no map."""
    sizes = within(sizes, same)
    grads = [None if m is None else _empty(m, sizes) for m in (same, finer)]
    if coarser is not None:
        batch, channels, height, width = coarser.shape
        through_blend = moments.new_zeros((batch, height, width, channels))
    for piece in pieces(same, sizes):
        parts = _parts(piece, same, finer, coarser)
        if grad_out is not None:
            grad_x = _upstream(piece, parts, grad_out, coefficients[:, piece.image])[-1]
        for index, part in parts[: 1 if finer is None else 2]:
            own = [m[:, index, piece.image] for m in (moments, grad_moments)]
            grad = _through_moments(part, *own, piece.height * piece.width)
            grad += own[1][2] / (piece.height * piece.width)
            if grad_out is not None:
                grad.addcmul_(grad_x, coefficients[index, piece.image])
            piece.write(grads[index], grad)
        if coarser is not None and grad_out is not None:
            grad_x.mul_(coefficients[2, piece.image])
            _add_upsampled_gradient(piece, grad_x, through_blend)
    if coarser is None:
        return grads[0], same.new_empty(0) if finer is None else grads[1], same.new_empty(0)
    coarser_sizes = half(sizes)
    coarser_grad = _empty(coarser, coarser_sizes)
    for piece in pieces(coarser, coarser_sizes):
        own = [m[:, 2, piece.image] for m in (moments, grad_moments)]
        grad = _through_moments(piece.of(coarser), *own, piece.height * piece.width)
        level_size = sizes[piece.image]
        covered = _covered(piece, coarser, level_size)[..., None].to(grad.dtype)
        grad.addcmul_(covered, own[1][2] / level_size.prod())
        grad += through_blend[piece.image, piece.rows, piece.columns]
        piece.write(coarser_grad, grad)
    return grads[0], same.new_empty(0) if finer is None else grads[1], coarser_grad


def _through_moments(part: Tensor, own: Tensor, grad: Tensor, count: int | Tensor) -> Tensor:
    """The gradient through mean and variance of a map of `count` true pixels; own and grad
    (3, C) are its moments and their gradients."""
    slope = 2 * grad[1] / count
    return torch.addcmul(grad[0] / count - slope * own[0], part, slope)
