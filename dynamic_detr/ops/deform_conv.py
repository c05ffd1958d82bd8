"""Modulated deformable convolution (Deformable ConvNets v2), the same operator on every device.

The Triton kernel samples inside the matrix product; the plain path gathers, then multiplies.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import kernel_serves
from .check import check_at_least, check_tensor
from .plain import deform_conv as plain

__all__ = ["deform_conv2d"]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Compute a convolution with displaced taps and modulated samples.

    The backward pass saves only the arguments. Second derivatives are not supported. On a GPU,
    atomic additions make the gradient of the input differ slightly between runs;
    `torch.use_deterministic_algorithms` selects the plain backward pass, which is slower.

    Args:
        input: (B, C, H, W).
        offset: (B, 2·kh·kw, Ho, Wo), displacement (y, x) of each tap in pixels of the input.
            Half precision rounds positions coarsely, so float32 or float64 is recommended.
        mask: (B, kh·kw, Ho, Wo), modulation of each tap; None for all ones.
        weight: (C_out, C / groups, kh, kw).
        bias: (C_out,) or None.
        stride, padding, dilation, groups: integers, as in `torch.nn.functional.conv2d`.

    Returns:
        (B, C_out, Ho, Wo) in channels-last memory, in the dtype of `input`, or in the autocast
        dtype under autocast. Positions and bilinear weights are computed in float32 or wider.

    Raises:
        ValueError: if a shape, dtype or device does not fit; the message names the argument.
    """
    _check(input, offset, mask, weight, bias, stride, padding, dilation, groups)
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if input.dtype != torch.float64:
        input = input.to(dtype)
    weight = weight.to(input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    with torch.autocast(device, enabled=False):
        return _forward(input, offset, mask, weight, bias, stride, padding, dilation, groups)


def _check(input, offset, mask, weight, bias, stride, padding, dilation, groups) -> None:
    name, device = "deform_conv2d", input.device
    check_at_least(name, 1, stride=stride, dilation=dilation, groups=groups)
    check_at_least(name, 0, padding=padding)
    check_tensor(f"{name}: input", input, ("B", "C", "H", "W"))
    check_tensor(f"{name}: weight", weight, ("C_out", "C / groups", "kh", "kw"), device)
    batch, channels, *size = input.shape
    out_channels, _, *kernel = weight.shape
    if channels % groups or out_channels % groups:
        raise ValueError(
            f"{name}: groups: expected a divisor of {channels} input channels and "
            f"{out_channels} output channels, got {groups}"
        )
    check_tensor(f"{name}: weight", weight, (out_channels, channels // groups, *kernel))
    taps = kernel[0] * kernel[1]
    out_size = [
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(size, kernel, strict=True)
    ]
    check_tensor(f"{name}: offset", offset, (batch, 2 * taps, *out_size), device)
    if mask is not None:
        check_tensor(f"{name}: mask", mask, (batch, taps, *out_size), device)
    if bias is not None:
        check_tensor(f"{name}: bias", bias, (out_channels,), device)


@torch.library.custom_op("dynamic_detr::deform_conv2d", mutates_args=())
def _forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> Tensor:
    arguments = (input, offset, mask, weight, bias, stride, padding, dilation, groups)
    if kernel_serves(input):
        from .kernels import deform_conv

        return deform_conv.forward(*arguments)
    return plain.forward(*arguments)


@_forward.register_fake
def _(input, offset, mask, weight, bias, stride, padding, dilation, groups):
    batch, _, height, width = offset.shape
    return input.new_empty(batch, height, width, weight.shape[0]).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.dynamic_detr.deform_conv2d)
def _(input_shape, offset_shape, mask_shape, weight_shape, *_, out_shape, **__) -> int:
    """Return the FLOPs of an ordinary convolution; interpolation is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


@torch.library.custom_op("dynamic_detr::deform_conv2d_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    needs_input: bool,
    needs_sampling: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad_out, input, offset, mask, weight, stride, padding, dilation, groups)
    needed = (needs_input, needs_sampling, needs_weight)
    ordered = needs_input and torch.are_deterministic_algorithms_enabled()
    if kernel_serves(input) and not ordered:
        from .kernels import deform_conv

        grads = deform_conv.backward(*arguments, *needed)
    else:
        grads = plain.backward(*arguments, *needed)
    likes = (input, offset, input if mask is None else mask, weight)
    return tuple(
        like.new_empty(0) if grad is None else grad.to(like.dtype)
        for grad, like in zip(grads, likes, strict=True)
    )


@_backward.register_fake
def _(
    grad_out, input, offset, mask, weight, stride, padding, dilation, groups,
    needs_input, needs_sampling, needs_weight,
):  # fmt: skip
    def channels_last(tensor: Tensor) -> Tensor:
        batch, channels, height, width = tensor.shape
        return tensor.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)

    return (
        channels_last(input) if needs_input else input.new_empty(0),
        channels_last(offset) if needs_sampling else offset.new_empty(0),
        channels_last(mask) if needs_sampling and mask is not None else input.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else weight.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    input, offset, mask, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _differentiate(ctx, grad_out: Tensor):
    input, offset, mask, weight = ctx.saved_tensors
    needs_input, needs_offset, needs_mask, needs_weight, needs_bias = ctx.needs_input_grad[:5]
    grads = _backward(
        *(grad_out, input, offset, mask, weight, *ctx.geometry),
        *(needs_input, needs_offset or needs_mask, needs_weight),
    )
    kept = [
        grad if needed else None
        for grad, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)
    ]
    bias_grad = grad_out.sum(dim=(0, 2, 3)) if needs_bias else None
    return *kept, bias_grad, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
