"""`masked_moments`, `blend_dyrelu` and their gradients in plain PyTorch: statistics image by image,
everything else band by band."""

import torch
from torch import Tensor

from .tiles import Band, add_upsampled_gradient, bands, half, result, upsampled

__all__ = ["blend", "coefficient_gradients", "map_gradients", "moments"]


def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """(3, 3, B, C): see `masked_moments`."""
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
    """(2, B, C), in two passes: squares of what is not centred would drown the variance."""
    out = features.new_empty((2, *features.shape[:2]), dtype=_wide(features))
    if features.device.type == "cpu":
        for image, (height, width) in enumerate(sizes.tolist()):
            pixels = features[image : image + 1, :, :height, :width].to(out.dtype)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            out[0, image], out[1, image] = torch.batch_norm_update_stats(pixels, None, None, 0)
        return out
    for image, band in enumerate(bands(features, sizes)):
        pixels, count = band.read(features), sizes[image].prod()
        mean = out[0, image] = pixels.sum(dim=(0, 1, 2)) / count
        out[1, image] = band.masked(pixels - mean).square_().sum(dim=(0, 1, 2)) / count
    return out


def _mean_upsampled(coarser: Tensor, sizes: Tensor) -> Tensor:
    """(B, C), over the level's true pixels, of true sizes (B, 2)."""
    out = coarser.new_zeros(coarser.shape[:2], dtype=_wide(coarser))
    for band in bands(coarser, half(sizes)):
        out[band.images] += _total(band.read(coarser) * _covered(band, sizes))
    return out / _count(sizes)


def blend(
    same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor, coefficients: Tensor
) -> Tensor:
    """(B, C, H, W): see `blend_dyrelu`."""
    sizes = _within(sizes, same)
    out = result(same, sizes)
    for band in bands(same, sizes):
        own = _of_pixels(coefficients[:, band.images])
        x = _sum(_parts(band, same, finer, coarser), own)
        a1, b1, a2, b2 = own[3:]
        level = band.target(out, x)
        torch.maximum(torch.addcmul(b1, x, a1), torch.addcmul(b2, x, a2), out=level)
        band.write(out, level)
    return out


def coefficient_gradients(
    grad_out: Tensor,
    same: Tensor,
    finer: Tensor | None,
    coarser: Tensor | None,
    sizes: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """(7, B, C): the gradients of the coefficients of `blend_dyrelu`."""
    sizes = _within(sizes, same)
    grads = torch.zeros_like(coefficients)
    for band in bands(same, sizes):
        own, sums = _of_pixels(coefficients[:, band.images]), grads[:, band.images]
        parts = _parts(band, same, finer, coarser)
        x = _sum(parts, own)
        grad = band.read(grad_out)
        tilt = _tilted(grad, x, own)
        grad_sum = _sum_gradient(grad, tilt, own)
        for gain_grad, part in zip(sums[:3], parts, strict=True):
            if part is not None:
                gain_grad += _total(grad_sum * part)
        # the first line receives (grad + tilt) / 2, the second (grad - tilt) / 2
        intercepts, tilted = _total(grad), _total(tilt)
        slopes, tilted_slopes = _total(grad * x), _total(tilt.mul_(x))
        for line, sign in ((sums[3:5], 0.5), (sums[5:], -0.5)):
            line[0] += (slopes / 2).add_(tilted_slopes, alpha=sign)
            line[1] += (intercepts / 2).add_(tilted, alpha=sign)
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
    """The gradients of the maps through their moments and through `blend_dyrelu`; empty where
    there is no map.

    A pixel y of a map receives slope · y + shift through mean and variance, and gain · that of the
    sum through the blend.
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
    through_blend = None
    if coarser is not None:
        through_blend = torch.zeros_like(coarser, dtype=moments.dtype)

    for band in bands(same, sizes):
        images, own = band.images, _of_pixels(coefficients[:, band.images])
        parts = _parts(band, same, finer, coarser)
        grad = band.read(grad_out)
        grad_sum = _sum_gradient(grad, _tilted(grad, _sum(parts, own), own), own)
        for index, part in enumerate(parts[:2]):
            if part is not None:
                grad = band.target(grads[index], part)
                torch.addcmul(
                    _of_pixels(shift[index, images]),
                    part,
                    _of_pixels(slope[index, images]),
                    out=grad,
                )
                band.write(grads[index], grad.addcmul_(grad_sum, own[index]))
        if coarser is not None:
            add_upsampled_gradient(band, grad_sum.mul_(own[2]), through_blend)

    if coarser is not None:
        for band in bands(coarser, half(sizes)):
            own = _of_pixels(torch.stack([shift[2], slope[2], pooled[2]])[:, band.images])
            grad = torch.addcmul(own[0], band.read(coarser), own[1])
            grad.addcmul_(_covered(band, sizes).to(grad.dtype), own[2])
            band.write(grads[2], grad.add_(band.read(through_blend)))
    return grads


def _wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _within(sizes: Tensor, features: Tensor) -> Tensor:
    """True sizes, where an image may claim to be larger than its map."""
    height, width = features.shape[-2:]
    return torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], dim=1)


def _count(sizes: Tensor) -> Tensor:
    """True pixels of each image, (B, 1)."""
    return sizes[:, :1] * sizes[:, 1:]


def _covered(band: Band, sizes: Tensor) -> Tensor:
    """How many true pixels of the level, of true sizes (B, 2), each pixel of a band of the coarser
    map covers: (images, rows, columns, 1). Images of one size there may differ by a pixel here.

    It is also the sum of the weights with which the level reads it: ¼ + ¾ + ¾ + ¼ in each
    direction, where at an edge what a pixel loses on one side it gains by being continued.
    """
    height, width = sizes[band.images, None].unbind(dim=-1)  # (images, 1)
    row = torch.arange(band.rows.start, band.rows.stop, device=sizes.device)
    column = torch.arange(band.columns.stop, device=sizes.device)
    tall, wide = (height - 2 * row).clamp(0, 2), (width - 2 * column).clamp(0, 2)
    return (tall[:, :, None] * wide[:, None])[..., None]


def _of_pixels(values: Tensor) -> Tensor:
    """(..., images, C) to what broadcasts with a part."""
    return values[..., None, None, :]


def _total(part: Tensor) -> Tensor:
    """(images, C)."""
    return part.sum(dim=(1, 2))


def _parts(band: Band, same, finer, coarser) -> list[Tensor | None]:
    """What the three maps are in a band of the level."""
    return [
        band.read(same),
        None if finer is None else band.read(finer),
        None if coarser is None else upsampled(band, coarser),
    ]


def _sum(parts: list[Tensor | None], own: Tensor) -> Tensor:
    """x, the sum of the maps in a band by their gains, the first of an image's coefficients."""
    total = parts[0] * own[0]
    for part, gain in zip(parts[1:], own[1:3], strict=True):
        if part is not None:
            total.addcmul_(part, gain)
    return total


def _tilted(grad: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """The gradient of the result, its sign changed where the second line is the larger; 0 where
    they meet: half goes to each there, as `torch.maximum` has it."""
    a1, b1, a2, b2 = own[3:]
    return torch.addcmul(b1 - b2, x, a1 - a2).sign_().mul_(grad)


def _sum_gradient(grad: Tensor, tilt: Tensor, own: Tensor) -> Tensor:
    """The gradient of x: what the lines receive, each times its slope."""
    a1, _, a2, _ = own[3:] / 2
    return (grad * (a1 + a2)).addcmul_(tilt, a1 - a2)
