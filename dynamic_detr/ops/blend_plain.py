"""`masked_moments`, `blend_dyrelu` and their gradients in plain PyTorch, band by band."""

import torch
from torch import Tensor

from .level_bands import Band, add_upsampled_gradient, bands, covered, half, upsampled

__all__ = ["blend", "coefficient_gradients", "map_gradients", "moments"]


def moments(same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor) -> Tensor:
    """(3, 3, B, C): see `masked_moments`."""
    sizes = _within(sizes, same)
    dtype = torch.promote_types(same.dtype, torch.float32)
    out = same.new_zeros((3, 3, *same.shape[:2]), dtype=dtype)
    for index, features in enumerate((same, finer)):
        if features is not None:
            out[:2, index] = _mean_and_variance(features, sizes)
            out[2, index] = out[0, index]
    if coarser is not None:
        out[:2, 2] = _mean_and_variance(coarser, half(sizes))
        for band in bands(coarser, half(sizes)):
            seen = band.read(coarser) * covered(band, coarser, sizes)
            out[2, 2, band.images] += seen.sum(dim=(1, 2))
        out[2, 2] /= _count(sizes)
    return out


def _mean_and_variance(features: Tensor, sizes: Tensor) -> Tensor:
    """(2, B, C), in two passes: squares of what is not centred would drown the variance."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    mean, variance = out = features.new_zeros((2, *features.shape[:2]), dtype=dtype)
    for band in bands(features, sizes):
        mean[band.images] += band.read(features).sum(dim=(1, 2))
    mean /= _count(sizes)
    for band in bands(features, sizes):
        centred = band.masked(band.read(features) - _of_pixels(mean[band.images]))
        variance[band.images] += centred.square_().sum(dim=(1, 2))
    variance /= _count(sizes)
    return out


def blend(
    same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor, coefficients: Tensor
) -> Tensor:
    """(B, C, H, W): see `blend_dyrelu`."""
    sizes = _within(sizes, same)
    out = torch.empty_like(same, memory_format=torch.channels_last)
    for band in bands(same, sizes):
        own = _of_pixels(coefficients[:, band.images])
        x = _sum(_parts(band, same, finer, coarser), own)
        first, second = _lines(x, own)
        band.write(out, torch.maximum(first, second, out=first))
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
        first, second = _line_gradients(band.read(grad_out), x, own)
        grad_sum = _sum_gradient(first, second, own)
        for gain_grad, part in zip(sums[:3], parts, strict=True):
            if part is not None:
                gain_grad += (grad_sum * part).sum(dim=(1, 2))
        for slope_grad, intercept_grad, line in ((*sums[3:5], first), (*sums[5:], second)):
            intercept_grad += line.sum(dim=(1, 2))
            slope_grad += line.mul_(x).sum(dim=(1, 2))
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
    maps = same, finer, coarser
    count, half_count = _count(sizes), _count(half(sizes))
    counts = torch.stack([count, count, half_count])  # (3, B, 1)
    slope = 2 * grad_moments[1] / counts
    shift = grad_moments[0] / counts - slope * moments[0]
    pooled = grad_moments[2] / count
    shift[:2] += pooled[:2]
    through_moments = torch.stack([shift, slope])  # (2, 3, B, C)
    grads = [
        same.new_empty(0) if m is None else torch.empty_like(m, memory_format=torch.channels_last)
        for m in maps
    ]
    through_blend = None
    if coarser is not None:
        through_blend = torch.zeros_like(coarser.permute(0, 2, 3, 1), dtype=moments.dtype)

    for band in bands(same, sizes):
        images, own = band.images, _of_pixels(coefficients[:, band.images])
        parts = _parts(band, same, finer, coarser)
        lines = _line_gradients(band.read(grad_out), _sum(parts, own), own)
        grad_sum = _sum_gradient(*lines, own)
        for index, part in enumerate(parts[:2]):
            if part is not None:
                own_shift, own_slope = _of_pixels(through_moments[:, index, images])
                grad = torch.addcmul(own_shift, part, own_slope)
                band.write(grads[index], grad.addcmul_(grad_sum, own[index]))
        if coarser is not None:
            add_upsampled_gradient(band, grad_sum.mul_(own[2]), through_blend[images])

    if coarser is not None:
        for band in bands(coarser, half(sizes)):
            images = band.images
            own = _of_pixels(torch.stack([shift[2, images], slope[2, images], pooled[2, images]]))
            grad = torch.addcmul(own[0], band.read(coarser), own[1])
            grad.addcmul_(covered(band, coarser, sizes), own[2])
            band.write(grads[2], grad.add_(through_blend[images, band.rows]))
    return grads


def _within(sizes: Tensor, features: Tensor) -> Tensor:
    """True sizes, where an image may claim to be larger than its map."""
    height, width = features.shape[-2:]
    return torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], dim=1)


def _count(sizes: Tensor) -> Tensor:
    """True pixels of each image, (B, 1)."""
    return sizes[:, :1] * sizes[:, 1:]


def _of_pixels(values: Tensor) -> Tensor:
    """(..., images, C) to what broadcasts with a part."""
    return values[..., None, None, :]


def _parts(band: Band, same, finer, coarser) -> list[Tensor | None]:
    """What the three maps are in a band of the level."""
    return [
        band.read(same),
        None if finer is None else band.read(finer),
        None if coarser is None else upsampled(band, same.shape[-1], coarser),
    ]


def _sum(parts: list[Tensor | None], own: Tensor) -> Tensor:
    """x, the sum of the maps in a band by their gains, the first of an image's coefficients."""
    total = parts[0] * own[0]
    for part, gain in zip(parts[1:], own[1:3], strict=True):
        if part is not None:
            total.addcmul_(part, gain)
    return total


def _lines(x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """a1·x + b1 and a2·x + b2."""
    a1, b1, a2, b2 = own[3:]
    return torch.addcmul(b1, x, a1), torch.addcmul(b2, x, a2)


def _line_gradients(grad: Tensor, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """What of the gradient of the result each line receives; half each where they meet, as
    `torch.maximum` has it."""
    first, second = _lines(x, own)
    share = first.sub_(second).sign_().add_(1).mul_(0.5)
    to_first = share.mul_(grad)
    return to_first, grad - to_first


def _sum_gradient(first: Tensor, second: Tensor, own: Tensor) -> Tensor:
    """The gradient of x, from those of the two lines."""
    return (first * own[3]).addcmul_(second, own[5])
