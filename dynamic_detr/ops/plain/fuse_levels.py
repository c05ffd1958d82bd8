"""The operations of `fuse_levels` on the maps of a level, in plain PyTorch. Statistics are computed
image by image, everything else tile by tile.

Common arguments:
    same: (B, C, H, W).
    finer: (B, C, H, W), or None.
    coarser: (B, C, ⌈H / 2⌉, ⌈W / 2⌉), or None.
    sizes: (B, 2) integers, true heights and widths of the level.
    coefficients: (7, B, C), the gains of the three maps, then a1, b1, a2 and b2.
"""

import torch
from torch import Tensor

from .tiles import Tile, add_upsampled_gradient, half, result, tiles, upsampled

__all__ = ["coefficient_gradients", "fuse", "map_gradients", "moments"]


def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """Return the moments (3, 3, B, C) of the maps.

    First dimension: mean and biased variance over the true pixels of the map, mean over the true
    pixels of the level after upsampling. Second dimension: same, finer, coarser; zeros for None.
    """
    sizes = _within(sizes, same)
    out = same.new_zeros((3, 3, *same.shape[:2]), dtype=_wide(same))
    for index, features in enumerate((same, finer)):
        if features is not None:
            out[:2, index] = _mean_and_variance(features, sizes)
            out[2, index] = out[0, index]
    if coarser is not None:
        out[:2, 2] = _mean_and_variance(coarser, half(sizes))
        out[2, 2] = _mean_upsampled(coarser, sizes)
    return out


def _mean_and_variance(features: Tensor, sizes: Tensor) -> Tensor:
    """Return (2, B, C), in two passes: with uncentred squares, a large mean costs accuracy."""
    out = features.new_empty((2, *features.shape[:2]), dtype=_wide(features))
    if features.device.type == "cpu":
        for image, (height, width) in enumerate(sizes.tolist()):
            pixels = features[image : image + 1, :, :height, :width].to(out.dtype)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            out[0, image], out[1, image] = torch.batch_norm_update_stats(pixels, None, None, 0)
        return out
    for image, tile in enumerate(tiles(features, sizes)):
        pixels, count = tile.read(features), sizes[image].prod()
        mean = out[0, image] = pixels.sum(dim=(0, 1, 2)) / count
        out[1, image] = tile.masked(pixels - mean).square_().sum(dim=(0, 1, 2)) / count
    return out


def _mean_upsampled(coarser: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean (B, C) over the true pixels of the level, whose true sizes are (B, 2)."""
    out = coarser.new_zeros(coarser.shape[:2], dtype=_wide(coarser))
    for tile in tiles(coarser, half(sizes)):
        out[tile.images] += _total(tile.read(coarser) * _covered(tile, sizes))
    return out / _count(sizes)


def fuse(
    same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor, coefficients: Tensor
) -> Tensor:
    """Return max(a1·x + b1, a2·x + b2) with x = Σ gain·map, (B, C, H, W), zero beyond the sizes."""
    sizes = _within(sizes, same)
    out = result(same, sizes)
    for tile in tiles(same, sizes):
        own = _of_pixels(coefficients[:, tile.images])
        x = _sum(_parts(tile, same, finer, coarser), own)
        a1, b1, a2, b2 = own[3:]
        level = tile.target(out, x)
        torch.maximum(torch.addcmul(b1, x, a1), torch.addcmul(b2, x, a2), out=level)
        tile.write(out, level)
    return out


def coefficient_gradients(
    grad_out: Tensor,
    same: Tensor,
    finer: Tensor | None,
    coarser: Tensor | None,
    sizes: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """Return the gradients of the coefficients of `fuse`, (7, B, C)."""
    sizes = _within(sizes, same)
    grads = torch.zeros_like(coefficients)
    for tile in tiles(same, sizes):
        own, sums = _of_pixels(coefficients[:, tile.images]), grads[:, tile.images]
        parts = _parts(tile, same, finer, coarser)
        x = _sum(parts, own)
        grad = tile.read(grad_out)
        signed = _signed(grad, x, own)
        grad_sum = _sum_gradient(grad, signed, own)
        for gain_grad, part in zip(sums[:3], parts, strict=True):
            if part is not None:
                gain_grad += _total(grad_sum * part)
        # the gradients of the two linear functions are (grad ± signed) / 2
        intercepts, signed_intercepts = _total(grad), _total(signed)
        slopes, signed_slopes = _total(grad * x), _total(signed.mul_(x))
        for function, sign in ((sums[3:5], 0.5), (sums[5:], -0.5)):
            function[0] += (slopes / 2).add_(signed_slopes, alpha=sign)
            function[1] += (intercepts / 2).add_(signed_intercepts, alpha=sign)
    return grads


def map_gradients(
    same: Tensor,
    finer: Tensor | None,
    coarser: Tensor | None,
    sizes: Tensor,
    moments: Tensor,
    grad_moments: Tensor,
    grad_out: Tensor,
    coefficients: Tensor,
) -> list[Tensor]:
    """Return the gradients of the maps through their moments and through `fuse`.

    The gradient of a pixel y of a map is slope · y + shift through mean and variance, plus gain ·
    (gradient of the sum x) through `fuse`. The result is an empty tensor for a map that is None.

    Args:
        moments, grad_moments: (3, 3, B, C), the result of `moments` and its gradient.
        grad_out: (B, C, H, W), gradient of the result of `fuse`.
    """
    sizes = _within(sizes, same)
    count, half_count = _count(sizes), _count(half(sizes))
    counts = torch.stack([count, count, half_count])  # (3, B, 1)
    slope = 2 * grad_moments[1] / counts
    shift = grad_moments[0] / counts - slope * moments[0]
    pooled = grad_moments[2] / count
    shift[:2] += pooled[:2]
    own_sizes = (sizes, sizes, half(sizes))
    maps = list(zip((same, finer, coarser), own_sizes, strict=True))
    grads = [same.new_empty(0) if m is None else result(m, s) for m, s in maps]
    through_fusion = None
    if coarser is not None:
        through_fusion = torch.zeros_like(coarser, dtype=moments.dtype)

    for tile in tiles(same, sizes):
        images, own = tile.images, _of_pixels(coefficients[:, tile.images])
        parts = _parts(tile, same, finer, coarser)
        grad = tile.read(grad_out)
        grad_sum = _sum_gradient(grad, _signed(grad, _sum(parts, own), own), own)
        for index, part in enumerate(parts[:2]):
            if part is not None:
                grad = tile.target(grads[index], part)
                torch.addcmul(
                    _of_pixels(shift[index, images]),
                    part,
                    _of_pixels(slope[index, images]),
                    out=grad,
                )
                tile.write(grads[index], grad.addcmul_(grad_sum, own[index]))
        if coarser is not None:
            add_upsampled_gradient(tile, grad_sum.mul_(own[2]), through_fusion)

    if coarser is not None:
        for tile in tiles(coarser, half(sizes)):
            own = _of_pixels(torch.stack([shift[2], slope[2], pooled[2]])[:, tile.images])
            grad = torch.addcmul(own[0], tile.read(coarser), own[1])
            grad.addcmul_(_covered(tile, sizes).to(grad.dtype), own[2])
            tile.write(grads[2], grad.add_(tile.read(through_fusion)))
    return grads


def _wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _within(sizes: Tensor, features: Tensor) -> Tensor:
    """Return the true sizes, at most that of the map."""
    height, width = features.shape[-2:]
    return torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], dim=1)


def _count(sizes: Tensor) -> Tensor:
    """Return the number of true pixels of each image, (B, 1)."""
    return sizes[:, :1] * sizes[:, 1:]


def _covered(tile: Tile, sizes: Tensor) -> Tensor:
    """Return how many true pixels of the level each pixel of a tile of the coarser map covers.

    This is also the sum of the pixel's upsampling weights, ¼ + ¾ + ¾ + ¼ in each direction:
    replication at an edge makes up for the missing neighbours.

    Args:
        tile: tile of the coarser map. Its images have equal sizes there, but their sizes at the
            level may differ by one pixel.
        sizes: (B, 2), true sizes of the level.

    Returns:
        (images, rows, columns, 1).
    """
    height, width = sizes[tile.images, None].unbind(dim=-1)  # (images, 1)
    row = torch.arange(tile.rows.start, tile.rows.stop, device=sizes.device)
    column = torch.arange(tile.columns.stop, device=sizes.device)
    tall, wide = (height - 2 * row).clamp(0, 2), (width - 2 * column).clamp(0, 2)
    return (tall[:, :, None] * wide[:, None])[..., None]


def _of_pixels(values: Tensor) -> Tensor:
    """Reshape (..., images, C) to broadcast with a part."""
    return values[..., None, None, :]


def _total(part: Tensor) -> Tensor:
    """Sum a part over its pixels: (images, C)."""
    return part.sum(dim=(1, 2))


def _parts(tile: Tile, same, finer, coarser) -> list[Tensor | None]:
    """Return the parts of the three maps in a tile of the level."""
    return [
        tile.read(same),
        None if finer is None else tile.read(finer),
        None if coarser is None else upsampled(tile, coarser),
    ]


def _sum(parts: list[Tensor | None], own: Tensor) -> Tensor:
    """Return x = Σ gain · part; `own` holds the coefficients of the tile's images."""
    total = parts[0] * own[0]
    for part, gain in zip(parts[1:], own[1:3], strict=True):
        if part is not None:
            total.addcmul_(part, gain)
    return total


def _signed(grad: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """Return grad where the first linear function is larger, -grad where the second is, and 0 where
    they are equal, so that each gets half, as in `torch.maximum`."""
    a1, b1, a2, b2 = own[3:]
    return torch.addcmul(b1 - b2, x, a1 - a2).sign_().mul_(grad)


def _sum_gradient(grad: Tensor, signed: Tensor, own: Tensor) -> Tensor:
    """Return the gradient of x: Σ slope · gradient of the linear function."""
    a1, _, a2, _ = own[3:] / 2
    return (grad * (a1 + a2)).addcmul_(signed, a1 - a2)
