"""Equations 5 to 7 applied to pixels: the weighted, normalised sum of a level's maps and its
DyReLU, in one read of each map and one write.

The coarser map is upsampled while it is read; beyond the true size there are zeros. The backward
pass reads the maps and the gradient once and writes nothing but the gradients of the coefficients;
those of the maps are left to `masked_moments` (which says why).
"""

import torch
from torch import Tensor

from .backend import kernel_serves
from .masked_moments import MeasuredMaps

__all__ = ["blend_dyrelu"]


def blend_dyrelu(maps: MeasuredMaps, coefficients: Tensor) -> Tensor:
    """max(a1·x + b1, a2·x + b2) of x = Σ gain·map, over the maps of one level.

    Args:
        maps: from `masked_moments`; they can be blended once.
        coefficients: (7, B, C): the gains of `same`, `finer` and `coarser` (ignored where there is
            no such map), then a1, b1, a2 and b2. Computed in float32 (float64 for float64 maps).

    Returns:
        (B, C, H, W) in the dtype of the maps and channels-last memory; zero beyond the true sizes.

    Raises:
        ValueError: the coefficients do not fit the maps, or the maps were blended before.
    """
    batch, channels = maps.same.shape[:2]
    if coefficients.shape != (7, batch, channels) or not coefficients.is_floating_point():
        raise ValueError(
            f"blend_dyrelu: coefficients is {coefficients.dtype} {tuple(coefficients.shape)}; "
            f"wants floating point (7, {batch}, {channels})."
        )
    if coefficients.device != maps.same.device:
        raise ValueError(
            f"blend_dyrelu: coefficients is on {coefficients.device}; "
            f"wants {maps.same.device}, as the maps."
        )
    if maps.blended:
        raise ValueError("blend_dyrelu: maps were blended before; measure them again.")
    maps.blended = maps.relays is not None
    dtype = torch.promote_types(maps.same.dtype, torch.float32)
    return _forward(
        maps.same,
        maps.finer,
        maps.coarser,
        maps.sizes,
        coefficients.to(dtype).contiguous(),
        *(maps.relays or (None, None)),
    )


@torch.library.custom_op(
    "dynamic_detr::blend_dyrelu",
    mutates_args=(),
    schema="(Tensor same, Tensor? finer, Tensor? coarser, Tensor sizes, Tensor coefficients,"
    " Tensor? out_relay, Tensor? coefficient_relay) -> Tensor",
)
def _forward(same, finer, coarser, sizes, coefficients, out_relay, coefficient_relay):
    if kernel_serves(same):
        from .kernels.fuse_levels import blend
    else:
        from .plain.fuse_levels import blend
    return blend(same, finer, coarser, sizes, coefficients)


@_forward.register_fake
def _(same, finer, coarser, sizes, coefficients, out_relay, coefficient_relay):
    return torch.empty_like(same, memory_format=torch.channels_last)


@torch.library.custom_op(
    "dynamic_detr::blend_dyrelu_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor same, Tensor? finer, Tensor? coarser, Tensor sizes,"
    " Tensor coefficients) -> Tensor",
)
def _backward(grad_out, same, finer, coarser, sizes, coefficients):
    if kernel_serves(same):
        from .kernels.fuse_levels import coefficient_gradients
    else:
        from .plain.fuse_levels import coefficient_gradients
    return coefficient_gradients(grad_out, same, finer, coarser, sizes, coefficients)


@_backward.register_fake
def _(grad_out, same, finer, coarser, sizes, coefficients):
    return torch.empty_like(coefficients)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate(ctx, grad_out):
    saved = ctx.saved_tensors  # asked once: under checkpointing, asking computes
    grad = _backward(grad_out, *saved) if ctx.needs_input_grad[4] else None
    relayed = (grad_out, saved[-1]) if ctx.needs_input_grad[5] else (None, None)
    return None, None, None, None, grad, *relayed


_forward.register_autograd(_differentiate, setup_context=_save)
