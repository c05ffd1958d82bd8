"""Multi-scale deformable attention (Deformable DETR, equation 3): each head of a query sums a few
samples of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import kernel_serves
from .check import check_spatial_shapes, check_tensor
from .plain import ms_deform_attn as plain

__all__ = ["ms_deform_attn"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute out = Σ_lp weight_lp · value_l(location_lp) for each head of each query.

    Samples are bilinear with zero padding; a location that is not finite gives zero. The backward
    pass saves only the arguments. Second derivatives are not supported. On a GPU, atomic additions
    make the gradient of the values differ slightly between runs;
    `torch.use_deterministic_algorithms` selects the plain backward pass, which is slower.

    Args:
        value: (B, ΣHW, heads, d), the levels concatenated, each in row-major order
            (`Pyramid.table`, projected).
        spatial_shapes: (H, W) of each of the L levels.
        sampling_locations: (B, Q, heads, L, P, 2) normalised x, y: (0, 0) is the upper left corner
            of the upper left pixel, (1, 1) the lower right corner of the lower right pixel. Half
            precision rounds positions coarsely, so float32 is recommended.
        attention_weights: (B, Q, heads, L, P).

    Returns:
        (B, Q, heads·d) in the dtype of `value`, or in the autocast dtype under autocast. Positions
        and weights are computed in float32 or wider.

    Raises:
        ValueError: if a shape, dtype or device does not fit; the message names the argument.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
    shapes = [side for shape in spatial_shapes for side in shape]
    with torch.autocast(device, enabled=False):
        return _forward(value, sampling_locations, attention_weights, shapes)


def _check(value, spatial_shapes, sampling_locations, attention_weights) -> None:
    name = "ms_deform_attn"
    check_spatial_shapes(f"{name}: spatial_shapes", spatial_shapes)
    positions = sum(height * width for height, width in spatial_shapes)
    check_tensor(f"{name}: value", value, ("B", positions, "heads", "d"))
    batch, _, heads, _ = value.shape
    sampling = (batch, "Q", heads, len(spatial_shapes), "P", 2)
    check_tensor(f"{name}: sampling_locations", sampling_locations, sampling, value.device)
    attention = sampling_locations.shape[:-1]
    check_tensor(f"{name}: attention_weights", attention_weights, attention, value.device)


# `shapes` holds H and W of each level: [H_0, W_0, H_1, W_1, ...].
@torch.library.custom_op("dynamic_detr::ms_deform_attn", mutates_args=())
def _forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    if kernel_serves(value):
        from .kernels import ms_deform_attn

        return ms_deform_attn.forward(value, locations, weights, shapes)
    return plain.forward(value, locations, weights, shapes)


@_forward.register_fake
def _(value, locations, weights, shapes):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("dynamic_detr::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    needs_value: bool,
    needs_sampling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (grad_out, value, locations, weights, shapes, needs_value, needs_sampling)
    ordered = needs_value and torch.are_deterministic_algorithms_enabled()
    if kernel_serves(value) and not ordered:
        from .kernels import ms_deform_attn

        grads = ms_deform_attn.backward(*arguments)
    else:
        grads = plain.backward(*arguments)
    return tuple(
        like.new_empty(0) if grad is None else grad
        for grad, like in zip(grads, (value, locations, weights), strict=True)
    )


@_backward.register_fake
def _(grad_out, value, locations, weights, shapes, needs_value, needs_sampling):
    needs = (needs_value, needs_sampling, needs_sampling)
    return tuple(
        like.new_empty(like.shape if needed else 0)
        for like, needed in zip((value, locations, weights), needs, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    value, locations, weights, ctx.shapes = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad_out: Tensor):
    needs_value, needs_locations, needs_weights, _ = ctx.needs_input_grad
    grads = _backward(
        grad_out, *ctx.saved_tensors, ctx.shapes, needs_value, needs_locations or needs_weights
    )
    needs = (needs_value, needs_locations, needs_weights)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
