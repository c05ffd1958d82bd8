"""Modulated deformable convolution (Deformable ConvNets v2) as a gather and a matrix product.

The sampled columns are made and multiplied chunk by chunk, so that they stay in cache in the
forward pass; the backward pass makes them again, so that nothing but the inputs is kept.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gather import bilinear_corners, weighted_gather

__all__ = ["deform_conv2d"]

CACHE_CHUNK = 2048  # positions whose columns stay in a CPU's cache
MEMORY_CHUNK = 16384  # positions whose columns are about as large as the gradient of a map


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
    """Convolves a map at displaced positions, each sample scaled by its modulation.

    Args:
        input: (B, C, H, W).
        offset: (B, 2·kh·kw, Ho, Wo), displacement (y, x) of each tap in pixels of the input.
        mask: (B, kh·kw, Ho, Wo), modulation of each tap; None for all ones.
        weight: (C_out, C / groups, kh, kw).
        bias: (C_out,) or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, one number each.

    Returns:
        (B, C_out, Ho, Wo) in channels-last memory and in the input's dtype (under autocast: in
        the autocast dtype). Positions and weights are computed in float32 whatever the features
        are.

    Raises:
        ValueError: a shape does not fit; the line names the argument.
    """
    _check_shapes(input, offset, mask, weight, bias, stride, padding, dilation, groups)
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if input.is_floating_point() and input.dtype != torch.float64:
        input = input.to(dtype)
    taps = weight.shape[2] * weight.shape[3]
    # (B, Ho, Wo, taps, 2) and (B, Ho, Wo, taps): views where the maps are channels last
    displacement = offset.permute(0, 2, 3, 1).unflatten(-1, (taps, 2))
    modulation = None if mask is None else mask.permute(0, 2, 3, 1)
    with torch.autocast(device, enabled=False):
        out = _DeformConv2d.apply(
            input.permute(0, 2, 3, 1),
            displacement,
            modulation,
            weight.to(input.dtype),
            (stride, padding, dilation, groups),
        ).permute(0, 3, 1, 2)
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def _check_shapes(input, offset, mask, weight, bias, stride, padding, dilation, groups) -> None:
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"deform_conv2d: input {tuple(input.shape)} and weight {tuple(weight.shape)} "
            "must be (B, C, H, W) and (C_out, C / groups, kh, kw)."
        )
    for name, number, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", groups, 1),
    ):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"deform_conv2d: {name} is {number!r}; wants an integer >= {least}.")
    out_channels, channels, kh, kw = weight.shape
    if input.shape[1] != channels * groups or out_channels % groups:
        raise ValueError(
            f"deform_conv2d: weight {tuple(weight.shape)} with {groups} groups wants an input of "
            f"{channels * groups} channels and C_out divisible by the groups; input has "
            f"{input.shape[1]} channels."
        )
    size = [
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(input.shape[2:], (kh, kw), strict=True)
    ]
    for name, tensor, wanted in (("offset", offset, 2 * kh * kw), ("mask", mask, kh * kw)):
        if tensor is not None and tuple(tensor.shape) != (input.shape[0], wanted, *size):
            raise ValueError(
                f"deform_conv2d: {name} has shape {tuple(tensor.shape)}; "
                f"wants {(input.shape[0], wanted, *size)}."
            )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(
            f"deform_conv2d: bias has shape {tuple(bias.shape)}; wants ({out_channels},)."
        )


class _DeformConv2d(torch.autograd.Function):
    """Channels-last throughout: maps (B, H, W, C), offsets (B, Ho, Wo, taps, 2)."""

    @staticmethod
    def forward(ctx, features, offset, mask, weight, geometry):
        ctx.save_for_backward(features, offset, mask, weight)
        ctx.geometry = geometry
        features = features.contiguous()
        out = features.new_empty((*offset.shape[:3], weight.shape[0]))
        chunk = CACHE_CHUNK if features.device.type == "cpu" else MEMORY_CHUNK
        for images, rows in _chunks(offset.shape, chunk):
            part = _sample(features, offset, mask, weight.shape[2:], geometry, images, rows)
            out[images, rows] = _multiply(part, weight, geometry[-1]).view_as(out[images, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *sampled, weight = ctx.saved_tensors
        grads = [
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        *sampled_grads, grad_weight = grads
        for images, rows in _chunks(grad_out.shape, MEMORY_CHUNK):
            where = ((images,), (images, rows), (images, rows))
            leaves = [
                None if tensor is None else tensor[index].detach().requires_grad_(grad is not None)
                for tensor, index, grad in zip(sampled, where, sampled_grads, strict=True)
            ]
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            with torch.set_grad_enabled(bool(wanted)):
                columns = _sample(*leaves, weight.shape[2:], ctx.geometry, None, rows)
            part = grad_out[images, rows].flatten(0, 2)
            if grad_weight is not None:
                grad_weight += _weight_grad(part, columns.detach(), weight, ctx.geometry[-1])
            if not wanted:
                continue
            grad_columns = _column_grad(part, weight, ctx.geometry[-1])
            found = iter(torch.autograd.grad(columns, wanted, grad_columns))
            for grad, index in zip(sampled_grads, where, strict=True):
                if grad is not None:
                    grad[index] += next(found)
        return *grads, None


def _chunks(shape: tuple[int, ...], limit: int):
    """Splits (B, Ho, Wo) into parts of whole images, or of whole rows of one image."""
    batch, height, width = shape[:3]
    if height * width == 0:
        return
    images = max(1, limit // (height * width))
    rows = max(1, limit // width) if images == 1 else height
    for first in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(first, min(first + images, batch)), slice(row, min(row + rows, height))


def _sample(features, offset, mask, kernel, geometry, images, rows) -> Tensor:
    """Sampled columns (positions, taps, C) of the given output rows.

    With `images` None, `features`, `offset` and `mask` are already cut to the part.
    """
    stride, padding, dilation, _ = geometry
    if images is not None:
        features, offset = features[images], offset[images, rows]
        mask = None if mask is None else mask[images, rows]
    batch, height, width, channels = features.shape
    device = offset.device
    dtype = torch.promote_types(offset.dtype, torch.float32)

    def grid(first: int, last: int, step: int) -> Tensor:
        return torch.arange(first, last, device=device, dtype=dtype) * step

    kh, kw = kernel
    tap_y = grid(0, kh, dilation).repeat_interleave(kw) - padding
    tap_x = grid(0, kw, dilation).repeat(kh) - padding
    base_y = grid(rows.start, rows.stop, stride)[:, None, None] + tap_y  # (rows, 1, taps)
    base_x = grid(0, offset.shape[2], stride)[:, None] + tap_x  # (Wo, taps)
    index, corner_weight = bilinear_corners(
        offset[..., 0].to(dtype) + base_y, offset[..., 1].to(dtype) + base_x, height, width, width
    )  # (b, rows, Wo, taps, 4)
    if mask is not None:
        corner_weight = corner_weight * mask[..., None].to(dtype)
    if batch > 1:
        first_row = torch.arange(batch, device=device, dtype=torch.int32) * (height * width)
        index = index + first_row[:, None, None, None, None]
    table = features.reshape(batch * height * width, channels)
    columns = weighted_gather(table, index.flatten(0, -2), corner_weight.flatten(0, -2))
    return columns.view(-1, kh * kw, channels)


def _matrices(weight: Tensor, groups: int) -> Tensor:
    """(C_out, C / groups, kh, kw) to (groups, C_out / groups, taps · C / groups)."""
    return weight.flatten(2).transpose(1, 2).flatten(1).unflatten(0, (groups, -1))


def _grouped(columns: Tensor, groups: int) -> Tensor:
    """(positions, taps, C) to (groups, positions, taps · C / groups)."""
    if groups == 1:
        return columns.flatten(1)[None]
    return columns.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float16 and a.device.type == "cpu":  # emulated there, 90 times slower
        return torch.bmm(a.float(), b.float()).to(a.dtype)
    if a.shape[0] == 1:  # one product is faster than a batch of one
        return torch.mm(a[0], b[0])[None]
    return torch.bmm(a, b)


def _multiply(columns: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Columns (positions, taps, C) to the output (positions, C_out)."""
    out = _matmul(_grouped(columns, groups), _matrices(weight, groups).transpose(1, 2))
    return out.transpose(0, 1).flatten(1)


def _column_grad(grad_out: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of the columns (positions, taps, C) from that of the output."""
    per_group = grad_out.unflatten(1, (groups, -1)).transpose(0, 1)
    grad = _matmul(per_group, _matrices(weight, groups))  # (groups, positions, taps · C / groups)
    grad = grad.unflatten(2, (-1, weight.shape[1]))  # (groups, positions, taps, C / groups)
    return grad[0] if groups == 1 else grad.permute(1, 2, 0, 3).flatten(2)


def _weight_grad(grad_out: Tensor, columns: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of the weight, in its own shape."""
    per_group = grad_out.unflatten(1, (groups, -1)).permute(1, 2, 0)
    grad = _matmul(per_group, _grouped(columns, groups))  # (groups, C_out / groups, taps · C / …)
    out_channels, channels = weight.shape[:2]
    return grad.view(out_channels, -1, channels).transpose(1, 2).reshape(weight.shape)
