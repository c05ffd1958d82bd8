"""What GroupNorm, scale attention and DyReLU want to know of a level, in one read of its maps.

An encoder block makes a level out of up to three maps: one of the level `same`, one of the
`finer` neighbour at the level's size, one of the `coarser` neighbour at half of it, upsampled. All
that normalises and weights them depends on three numbers per image and channel of each: mean,
variance, and mean after upsampling. Upsampling is linear, so that the last is a weighted mean of
the small map: a coarse pixel weighs as much as it covers true pixels of the level.

Gradient in one pass. The gradient of a map is the sum of what flows through `blend_dyrelu` and of
what flows through its moments, the second known only after the first has been summed up over the
whole map. Had each operator its own, a map would be read twice, written twice, and added. Instead
`MeasuredMaps` holds two tensors of stride zero, the relays, through which autograd hands what
`blend_dyrelu` knows when its turn comes, the gradient of its result and its coefficients, to the
backward pass of `masked_moments`, which does the rest at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import kernel_serves

__all__ = ["MeasuredMaps", "masked_moments"]


@dataclass
class MeasuredMaps:
    """The maps of one level, on their way from `masked_moments` to `blend_dyrelu`.

    Args:
        same, finer, coarser, sizes: as `masked_moments` got them, the maps in channels-last memory.
        relays: what `blend_dyrelu` sends back through; None where no gradient is wanted.
        blended: whether they were used; the relays serve once.
    """

    same: Tensor
    finer: Tensor | None
    coarser: Tensor | None
    sizes: Tensor
    relays: tuple[Tensor, Tensor] | None
    blended: bool = False


def masked_moments(
    same: Tensor, finer: Tensor | None, coarser: Tensor | None, sizes: Tensor
) -> tuple[Tensor, MeasuredMaps]:
    """Moments of up to three maps over their true pixels.

    On the CPU, and where kernels cannot run, plain PyTorch in bands that stay in cache. Variances
    come from centred squares, so that a large mean does not drown them. Autocast changes nothing.
    Gradients flow to the maps once; there are no gradients of gradients.

    Args:
        same: (B, C, H, W).
        finer: like `same`, or None.
        coarser: (B, C, ⌈H / 2⌉, ⌈W / 2⌉), or None. Its true pixels are half of those of the level,
            rounded up; its last true row and column are continued, and it is upsampled twofold
            (bilinear, align_corners=False) and cropped.
        sizes: (B, 2) integers, true height and width of the level for each image, at least 1.

    Returns:
        moments: (3, 3, B, C) float32 (float64 for float64 maps). First index: mean and (biased)
            variance over the true pixels of the map itself, mean over the true pixels of the level
            after upsampling. Second: same, finer, coarser; zero where there is no map.
        maps: to be handed to `blend_dyrelu`, once.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the line names the argument.
    """
    _check(same, finer, coarser, sizes)
    same, finer, coarser = (
        None if m is None else m.contiguous(memory_format=torch.channels_last)
        for m in (same, finer, coarser)
    )
    differentiable = torch.is_grad_enabled() and any(
        m is not None and m.requires_grad for m in (same, finer, coarser)
    )
    moments, *relays = _forward(same, finer, coarser, sizes, differentiable)
    relays = tuple(relays) if differentiable else None
    return moments, MeasuredMaps(same, finer, coarser, sizes, relays)


def _check(same, finer, coarser, sizes) -> None:
    if same.dim() != 4 or not same.is_floating_point():
        raise ValueError(
            f"masked_moments: same is {same.dtype} {tuple(same.shape)}; "
            "wants floating point (B, C, H, W)."
        )
    batch, channels, height, width = same.shape
    half = (batch, channels, (height + 1) // 2, (width + 1) // 2)
    for name, tensor, shape in (("finer", finer, tuple(same.shape)), ("coarser", coarser, half)):
        if tensor is None:
            continue
        found, wanted = (tuple(tensor.shape), tensor.dtype), (shape, same.dtype)
        if found != wanted:
            raise ValueError(
                f"masked_moments: {name} is {found[1]} {found[0]}; wants {wanted[1]} {wanted[0]}."
            )
    if sizes.shape != (batch, 2) or sizes.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"masked_moments: sizes is {sizes.dtype} {tuple(sizes.shape)}; "
            f"wants int32 or int64 ({batch}, 2)."
        )
    for name, tensor in (("finer", finer), ("coarser", coarser), ("sizes", sizes)):
        if tensor is not None and tensor.device != same.device:
            raise ValueError(
                f"masked_moments: {name} is on {tensor.device}; wants {same.device}, as same."
            )


@torch.library.custom_op(
    "dynamic_detr::masked_moments",
    mutates_args=(),
    schema="(Tensor same, Tensor? finer, Tensor? coarser, Tensor sizes, bool differentiable)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(same, finer, coarser, sizes, differentiable):
    if kernel_serves(same):
        from .kernels.fuse_levels import moments as measure
    else:
        from .plain.fuse_levels import moments as measure
    moments = measure(same, finer, coarser, sizes)
    return moments, *_relays(same, moments, differentiable)


@_forward.register_fake
def _(same, finer, coarser, sizes, differentiable):
    dtype = torch.promote_types(same.dtype, torch.float32)
    moments = same.new_empty((3, 3, *same.shape[:2]), dtype=dtype)
    return moments, *_relays(same, moments, differentiable)


def _relays(same: Tensor, moments: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Tensors without memory of their own, shaped as the result of `blend_dyrelu` and as its
    coefficients."""
    if not differentiable:
        return same.new_empty(0), same.new_empty(0)
    coefficients = (7, *moments.shape[2:])
    return same.new_zeros(()).expand(same.shape), moments.new_zeros(()).expand(coefficients)


@torch.library.custom_op(
    "dynamic_detr::masked_moments_backward",
    mutates_args=(),
    schema="(Tensor same, Tensor? finer, Tensor? coarser, Tensor sizes, Tensor moments,"
    " Tensor grad_moments, Tensor grad_out, Tensor coefficients) -> (Tensor, Tensor, Tensor)",
)
def _backward(same, finer, coarser, sizes, moments, grad_moments, grad_out, coefficients):
    arguments = (same, finer, coarser, sizes, moments, grad_moments, grad_out, coefficients)
    if kernel_serves(same):
        from .kernels.fuse_levels import map_gradients
    else:
        from .plain.fuse_levels import map_gradients
    return map_gradients(*arguments)


@_backward.register_fake
def _(same, finer, coarser, sizes, moments, grad_moments, grad_out, coefficients):
    return tuple(
        same.new_empty(0)
        if features is None
        else torch.empty_like(features, memory_format=torch.channels_last)
        for features in (same, finer, coarser)
    )


def _save(ctx, inputs, output) -> None:
    *maps, sizes, _ = inputs
    ctx.save_for_backward(*maps, sizes, output[0])


def _differentiate(ctx, grad_moments, grad_out, coefficients):
    *maps, sizes, moments = ctx.saved_tensors
    grads = _backward(*maps, sizes, moments, grad_moments, grad_out, coefficients)
    needed = zip(grads, maps, ctx.needs_input_grad, strict=False)
    return *(g if m is not None and need else None for g, m, need in needed), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
