"""Equations 5 to 7 behind the convolutions, for a whole pyramid in one operator:

    level' = DyReLU( mean over k of  s_k · GN_k(map_k) )
    s_k = hard_sigmoid( ReLU( scale( mean of GN_k(map_k) ) ) )

over the maps k of a level: its own (`same`), that of the `finer` neighbour, which has the level's
size, and that of the `coarser` one, which has half of it and is upsampled here.

Operation by operation this would move every map through memory a dozen times. But norm, weight and
mean are linear in the maps, so that a level is max(a1·x + b1, a2·x + b2) of x = Σ_k gain_k · map_k,
and gains, slopes a and intercepts b depend on three numbers per channel of each map: its mean, its
variance, and its mean after upsampling. The first read of the maps takes these moments; a few
operations on (L, 3, B, C) numbers make the coefficients of all levels; the second read writes the
levels. The backward pass reads the maps once for the gradients of the coefficients, and once for
their own, through coefficients and moments together (`docs/encoder.md` counts).
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import kernel_serves
from .check import check_tensor

__all__ = ["FusionWeights", "fuse_levels"]


class FusionWeights(NamedTuple):
    """The parameters of `fuse_levels`, in any floating dtype; they are used in float32 or wider.

    Args:
        conv_bias: (3, C), biases that the convolutions of `same`, `finer` and `coarser` left out;
            (1, C) where there is one level.
        norm_weight, norm_bias: of the three GroupNorms, in the same shape.
        scale_weight, scale_bias: (1, C) and (1,), of the scale attention; None for a plain mean.
        reduce_weight, reduce_bias: (D, C) and (D,), of the DyReLU's first layer; None for a ReLU.
        expand_weight, expand_bias: (4·C, D) and (4·C,), of its second.
    """

    conv_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    scale_weight: Tensor | None = None
    scale_bias: Tensor | None = None
    reduce_weight: Tensor | None = None
    reduce_bias: Tensor | None = None
    expand_weight: Tensor | None = None
    expand_bias: Tensor | None = None


def fuse_levels(
    same: Sequence[Tensor],
    finer: Sequence[Tensor],
    coarser: Sequence[Tensor],
    sizes: Sequence[Tensor],
    weights: FusionWeights,
    num_groups: int,
    eps: float = 1e-5,
) -> list[Tensor]:
    """Normalises, weighs, averages and activates the maps of every level.

    Means, variances and pools are taken over true pixels. A coarser map is upsampled twofold
    (bilinear, align_corners=False), its last true row and column continued, and cropped. Autocast
    changes nothing. Variances come from centred squares, so that a large mean does not drown them.
    There are no gradients of gradients.

    Args:
        same: (B, C, H, W) for each of the L levels, fine to coarse; each level has half the size
            of the one before, rounded up.
        finer: for each level but the first, a map of the level's shape.
        coarser: for each level but the last, a map of the shape of the next.
        sizes: for each level (B, 2) integers, the true (height, width) for each image, at least 1.
        weights: of convolutions, norms, scale attention and DyReLU.
        num_groups, eps: of the GroupNorms.

    Returns:
        (B, C, H, W) for each level, in the dtype of the maps and channels-last memory; zero beyond
        the true sizes.

    Raises:
        ValueError: an argument does not fit; the line names it.
    """
    _check(same, finer, coarser, sizes, weights, num_groups)
    same, finer, coarser = (
        [m.contiguous(memory_format=torch.channels_last) for m in maps]
        for maps in (same, finer, coarser)
    )
    levels, _ = _forward(same, finer, coarser, list(sizes), *weights, num_groups, eps)
    return levels


def _check(same, finer, coarser, sizes, weights, num_groups) -> None:
    name, levels = "fuse_levels", len(same)
    for argument, maps, wanted in (
        ("same", same, max(levels, 1)),
        ("finer", finer, levels - 1),
        ("coarser", coarser, levels - 1),
        ("sizes", sizes, levels),
    ):
        if len(maps) != wanted:
            raise ValueError(f"{name}: {argument} has {len(maps)} tensors; wants {wanted}.")
    check_tensor(f"{name}: same[0]", same[0], ("B", "C", "H", "W"))
    device, dtype = same[0].device, same[0].dtype
    batch, channels, height, width = same[0].shape
    for i in range(levels):
        shape = (batch, channels, height, width)
        maps = {f"same[{i}]": same[i]}
        if i > 0:
            maps |= {f"finer[{i - 1}]": finer[i - 1], f"coarser[{i - 1}]": coarser[i - 1]}
        for argument, features in maps.items():
            check_tensor(f"{name}: {argument}", features, shape, device)
            if features.dtype != dtype:
                raise ValueError(f"{name}: {argument} is {features.dtype}; wants {dtype}.")
        check_tensor(f"{name}: sizes[{i}]", sizes[i], (batch, 2), device, integer=True)
        height, width = (height + 1) // 2, (width + 1) // 2
    if channels % num_groups:
        raise ValueError(f"{name}: num_groups is {num_groups}; wants a divisor of {channels}.")
    branches = 1 if levels == 1 and len(weights.conv_bias) == 1 else 3
    hidden = "D" if weights.reduce_bias is None else weights.reduce_bias.shape[0]
    wanted = FusionWeights(
        *[(branches, channels)] * 3,
        (1, channels),
        (1,),
        (hidden, channels),
        (hidden,),
        (4 * channels, hidden),
        (4 * channels,),
    )
    for argument, tensor in weights._asdict().items():
        if tensor is not None:
            check_tensor(f"{name}: {argument}", tensor, getattr(wanted, argument), device)


@torch.library.custom_op(
    "dynamic_detr::fuse_levels",
    mutates_args=(),
    schema="(Tensor[] same, Tensor[] finer, Tensor[] coarser, Tensor[] sizes, Tensor conv_bias,"
    " Tensor norm_weight, Tensor norm_bias, Tensor? scale_weight, Tensor? scale_bias,"
    " Tensor? reduce_weight, Tensor? reduce_bias, Tensor? expand_weight, Tensor? expand_bias,"
    " int num_groups, float eps) -> (Tensor[], Tensor)",
)
def _forward(same, finer, coarser, sizes, *parameters):
    """The levels, and the moments (3, L, 3, B, C): first the mean, the variance (biased) and the
    mean after upsampling; third same, finer and coarser, zeros where there is no such map."""
    backend, levels = _backend(same[0]), list(_by_level(same, finer, coarser, sizes))
    moments = torch.stack([backend.moments(*level) for level in levels], dim=1)
    coefficients = _coefficients(moments, *parameters).unbind()
    return [backend.fuse(*lvl, c) for lvl, c in zip(levels, coefficients, strict=True)], moments


@_forward.register_fake
def _(same, finer, coarser, sizes, *parameters):
    dtype = torch.promote_types(same[0].dtype, torch.float32)
    moments = same[0].new_empty((3, len(same), 3, *same[0].shape[:2]), dtype=dtype)
    return [torch.empty_like(m, memory_format=torch.channels_last) for m in same], moments


@torch.library.custom_op(
    "dynamic_detr::fuse_levels_coefficient_gradients",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor[] same, Tensor[] finer, Tensor[] coarser, Tensor[] sizes,"
    " Tensor coefficients) -> Tensor",
)
def _coefficient_gradients(grads, same, finer, coarser, sizes, coefficients):
    backend = _backend(same[0])
    levels = zip(grads, _by_level(same, finer, coarser, sizes), coefficients, strict=True)
    return torch.stack([backend.coefficient_gradients(g, *level, c) for g, level, c in levels])


@_coefficient_gradients.register_fake
def _(grads, same, finer, coarser, sizes, coefficients):
    return torch.empty_like(coefficients)


@torch.library.custom_op(
    "dynamic_detr::fuse_levels_map_gradients",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor[] same, Tensor[] finer, Tensor[] coarser, Tensor[] sizes,"
    " Tensor moments, Tensor grad_moments, Tensor coefficients) -> (Tensor[], Tensor[], Tensor[])",
)
def _map_gradients(grads, same, finer, coarser, sizes, moments, grad_moments, coefficients):
    backend, levels = _backend(same[0]), _by_level(same, finer, coarser, sizes)
    numbers = zip(moments.unbind(1), grad_moments.unbind(1), grads, coefficients, strict=True)
    results = [
        backend.map_gradients(*level, *own) for level, own in zip(levels, numbers, strict=True)
    ]
    of_same, of_finer, of_coarser = zip(*results, strict=True)
    return list(of_same), list(of_finer[1:]), list(of_coarser[:-1])


@_map_gradients.register_fake
def _(grads, same, finer, coarser, sizes, moments, grad_moments, coefficients):
    return tuple(
        [torch.empty_like(m, memory_format=torch.channels_last) for m in maps]
        for maps in (same, finer, coarser)
    )


def _backend(features: Tensor) -> ModuleType:
    if kernel_serves(features):
        from .kernels import fuse_levels as backend
    else:
        from .plain import fuse_levels as backend
    return backend


def _by_level(
    same, finer, coarser, sizes
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]:
    """The maps of each level, None where there is no neighbour, and its true sizes."""
    return zip_longest(same, [None, *finer], coarser, sizes)


def _coefficients(
    moments: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    reduce_weight: Tensor | None,
    reduce_bias: Tensor | None,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> Tensor:
    """The gains of same, finer and coarser, a1, b1, a2 and b2 of all levels: (L, 7, B, C)."""
    dtype = moments.dtype
    conv_bias, norm_weight, norm_bias = (
        p.to(dtype)[:, None] for p in (conv_bias, norm_weight, norm_bias)
    )  # (3, 1, C)
    mean, variance, pooled = moments  # (L, 3, B, C)
    with torch.autocast(moments.device.type, enabled=False):
        gain, shift = _group_norm(
            mean + conv_bias, variance, norm_weight, norm_bias, num_groups, eps
        )
        shift = shift + gain * conv_bias
        weight = _one_by_number_of_maps(mean)
        if scale_weight is not None:
            score = F.linear(pooled * gain + shift, scale_weight.to(dtype), scale_bias.to(dtype))
            weight = weight * _hard_sigmoid(score.relu())
        gain, shift = weight * gain, (weight * shift).sum(dim=1)
        a1, b1, a2, b2 = torch.ones_like(shift), 0 * shift, 0 * shift, 0 * shift
        if reduce_weight is not None:
            pooled = (pooled * gain).sum(dim=1) + shift
            hidden = F.linear(pooled, reduce_weight.to(dtype), reduce_bias.to(dtype)).relu()
            y = _hard_sigmoid(F.linear(hidden, expand_weight.to(dtype), expand_bias.to(dtype)))
            a1, b1, a2, b2 = (y - 0.5).chunk(4, dim=-1)
            a1, a2 = 2 * a1 + 1, 2 * a2
        # the sum of the gained maps lacks the shift
        functions = torch.stack([a1, a1 * shift + b1, a2, a2 * shift + b2], dim=1)
        return torch.cat([gain, functions], dim=1)


def _group_norm(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The GroupNorm of y as y · gain + shift, from the moments (..., C) of the channels of y."""
    by_group = mean.unflatten(-1, (num_groups, -1))  # (..., G, C / G)
    centre = by_group.mean(dim=-1, keepdim=True)
    spread = variance.unflatten(-1, (num_groups, -1)) + (by_group - centre).square()
    scale = torch.rsqrt(spread.mean(dim=-1, keepdim=True) + eps)
    gain = scale.expand_as(by_group).flatten(-2) * weight
    return gain, bias - centre.expand_as(by_group).flatten(-2) * gain


def _one_by_number_of_maps(mean: Tensor) -> Tensor:
    """One by the number of maps of a level; 0 where there is no map: (L, 3, 1, 1)."""
    exists = torch.ones_like(mean[:, :, :1, :1])
    exists[0, 1], exists[-1, 2] = 0, 0
    return exists / exists.sum(dim=1, keepdim=True)


def _hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6  # torch's own takes a float32 of 1/6 in float64 too


def _setup_context(ctx, inputs, output) -> None:
    *maps, sizes = inputs[:4]
    *parameters, ctx.num_groups, ctx.eps = inputs[4:]
    ctx.num_levels = len(sizes)
    ctx.save_for_backward(*(m for part in maps for m in part), *sizes, *parameters, output[1])


def _differentiate(ctx, grads, grad_moments):
    *saved, moments = ctx.saved_tensors  # asked once: under checkpointing, asking computes
    maps = []
    for count in (0, -1, -1, 0):  # same, finer, coarser, sizes
        count += ctx.num_levels
        maps.append(saved[:count])
        saved = saved[count:]
    with torch.enable_grad():
        moments_leaf, *leaves = (
            None if t is None else t.detach().requires_grad_() for t in (moments, *saved)
        )
        coefficients = _coefficients(moments_leaf, *leaves, ctx.num_groups, ctx.eps)
    given = [moments_leaf, *(leaf for leaf in leaves if leaf is not None)]
    grad_coefficients = _coefficient_gradients(grads, *maps, coefficients.detach())
    with torch.autocast(moments.device.type, enabled=False):
        own, *parameter_grads = torch.autograd.grad(coefficients, given, grad_coefficients)
    grad_maps = _map_gradients(grads, *maps, moments, own + grad_moments, coefficients.detach())
    parameter_grads = [None if leaf is None else parameter_grads.pop(0) for leaf in leaves]
    return *grad_maps, [None] * ctx.num_levels, *parameter_grads, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
