"""Equations 5 to 7 after the convolutions, for a whole pyramid in one operator:

    level' = DyReLU( mean over k of  s_k · GN_k(map_k) )
    s_k = hard_sigmoid( ReLU( scale( mean of GN_k(map_k) ) ) )

A level has up to three maps k: its own (`same`), that of the `finer` neighbour, already in the size
of the level, and that of the `coarser` neighbour, in half that size, which is upsampled here.

Separate operations would read and write every map a dozen times. Norm, weight and mean are linear
in the maps, so a level is max(a1·x + b1, a2·x + b2) with x = Σ_k gain_k · map_k. The gains, slopes
a and intercepts b depend on three moments of each channel of each map: its mean, its variance and
its mean after upsampling. The forward pass reads the maps once for the moments, computes the
coefficients of all levels from (L, 3, B, C) tensors, and reads the maps again to write the levels.
The backward pass reads the maps once for the gradients of the coefficients and once for the
gradients of the maps. `docs/encoder.md` counts the memory traffic.
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

__all__ = ["FusionWeights", "fuse_levels", "hard_sigmoid"]


class FusionWeights(NamedTuple):
    """Parameters of `fuse_levels`, in any floating dtype; computed with in float32 or wider.

    Args:
        conv_bias: (3, C), biases of the convolutions that produced `same`, `finer` and `coarser`,
            which are added here; (1, C) if there is one level.
        norm_weight, norm_bias: parameters of the three GroupNorms, same shape as `conv_bias`.
        scale_weight, scale_bias: (1, C) and (1,), the scale attention; None for a plain mean.
        reduce_weight, reduce_bias: (D, C) and (D,), first layer of the DyReLU; None for a ReLU.
        expand_weight, expand_bias: (4·C, D) and (4·C,), second layer of the DyReLU.
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
    """Normalise, weight, average and activate the maps of every level.

    All statistics are taken over true pixels. A coarser map is upsampled by 2 (bilinear,
    align_corners=False) from its true pixels with replicated edges, and cropped. Variances are
    computed from centred squares, so a large mean costs no accuracy. Autocast has no effect. Second
    derivatives are not supported.

    Args:
        same: (B, C, H, W) for each of the L levels, fine to coarse; each level has half the size
            of the one before, rounded up.
        finer: for each level but the first, a map in the shape of the level.
        coarser: for each level but the last, a map in the shape of the next level.
        sizes: for each level (B, 2) integers, true (height, width) of each image, at least 1.
        weights: parameters of convolutions, norms, scale attention and DyReLU.
        num_groups, eps: options of the GroupNorms.

    Returns:
        (B, C, H, W) for each level, in the dtype of the maps and in channels-last memory; zero
        beyond the true sizes.

    Raises:
        ValueError: if an argument does not fit; the message names it.
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
    for argument, maps, expected in (
        ("same", same, max(levels, 1)),
        ("finer", finer, levels - 1),
        ("coarser", coarser, levels - 1),
        ("sizes", sizes, levels),
    ):
        if len(maps) != expected:
            raise ValueError(f"{name}: {argument}: expected {expected} tensors, got {len(maps)}")
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
                raise ValueError(f"{name}: {argument}: expected {dtype}, got {features.dtype}")
        check_tensor(f"{name}: sizes[{i}]", sizes[i], (batch, 2), device, integer=True)
        height, width = (height + 1) // 2, (width + 1) // 2
    if channels % num_groups:
        raise ValueError(
            f"{name}: num_groups: expected a divisor of {channels} channels, got {num_groups}"
        )
    branches = 1 if levels == 1 and len(weights.conv_bias) == 1 else 3
    hidden = "D" if weights.reduce_bias is None else weights.reduce_bias.shape[0]
    shapes = FusionWeights(
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
            check_tensor(f"{name}: {argument}", tensor, getattr(shapes, argument), device)


@torch.library.custom_op(
    "dynamic_detr::fuse_levels",
    mutates_args=(),
    schema="(Tensor[] same, Tensor[] finer, Tensor[] coarser, Tensor[] sizes, Tensor conv_bias,"
    " Tensor norm_weight, Tensor norm_bias, Tensor? scale_weight, Tensor? scale_bias,"
    " Tensor? reduce_weight, Tensor? reduce_bias, Tensor? expand_weight, Tensor? expand_bias,"
    " int num_groups, float eps) -> (Tensor[], Tensor)",
)
def _forward(same, finer, coarser, sizes, *parameters):
    """Return the levels and their moments (3, L, 3, B, C).

    First dimension: mean, biased variance, mean after upsampling. Third dimension: same, finer,
    coarser; zeros for a map that does not exist.
    """
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
    """Return the maps of each level, None for a missing neighbour, and its true sizes."""
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
    """Return gains of same, finer and coarser, a1, b1, a2 and b2 of each level: (L, 7, B, C)."""
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
        weight = _mean_weights(mean)
        if scale_weight is not None:
            score = F.linear(pooled * gain + shift, scale_weight.to(dtype), scale_bias.to(dtype))
            weight = weight * hard_sigmoid(score.relu())
        gain, shift = weight * gain, (weight * shift).sum(dim=1)
        a1, b1, a2, b2 = torch.ones_like(shift), 0 * shift, 0 * shift, 0 * shift
        if reduce_weight is not None:
            pooled = (pooled * gain).sum(dim=1) + shift
            hidden = F.linear(pooled, reduce_weight.to(dtype), reduce_bias.to(dtype)).relu()
            y = hard_sigmoid(F.linear(hidden, expand_weight.to(dtype), expand_bias.to(dtype)))
            a1, b1, a2, b2 = (y - 0.5).chunk(4, dim=-1)
            a1, a2 = 2 * a1 + 1, 2 * a2
        # x is the sum of gain · map without the shift, so the intercepts include it
        functions = torch.stack([a1, a1 * shift + b1, a2, a2 * shift + b2], dim=1)
        return torch.cat([gain, functions], dim=1)


def _group_norm(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return gain and shift of the GroupNorm y · gain + shift from the moments (..., C) of y."""
    by_group = mean.unflatten(-1, (num_groups, -1))  # (..., G, C / G)
    centre = by_group.mean(dim=-1, keepdim=True)
    spread = variance.unflatten(-1, (num_groups, -1)) + (by_group - centre).square()
    scale = torch.rsqrt(spread.mean(dim=-1, keepdim=True) + eps)
    gain = scale.expand_as(by_group).flatten(-2) * weight
    return gain, bias - centre.expand_as(by_group).flatten(-2) * gain


def _mean_weights(mean: Tensor) -> Tensor:
    """Return 1 / number of maps of a level, 0 for a map that does not exist: (L, 3, 1, 1)."""
    exists = torch.ones_like(mean[:, :, :1, :1])
    exists[0, 1], exists[-1, 2] = 0, 0
    return exists / exists.sum(dim=1, keepdim=True)


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return relu6(x + 3) / 6; the gradient of `F.hardsigmoid` has float32 accuracy in float64."""
    return F.relu6(x + 3) / 6


def _setup_context(ctx, inputs, output) -> None:
    *maps, sizes = inputs[:4]
    *parameters, ctx.num_groups, ctx.eps = inputs[4:]
    ctx.num_levels = len(sizes)
    ctx.save_for_backward(*(m for part in maps for m in part), *sizes, *parameters, output[1])


def _differentiate(ctx, grads, grad_moments):
    *saved, moments = ctx.saved_tensors  # once: activation checkpointing recomputes here
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
