"""Deformable convolution as a gather and a matrix product, in plain PyTorch, for any device.

The sampled columns are made and multiplied chunk by chunk, so that they stay in cache in the
forward pass; the backward pass makes them again, so that nothing but the inputs is kept.
"""

import torch
from torch import Tensor

from .gather import (
    bilinear_corners,
    bilinear_corners_backward,
    weighted_gather,
    weighted_gather_backward,
)

__all__ = ["backward", "forward"]

CACHE_CHUNK = 2048  # positions whose columns stay in a CPU's cache
MEMORY_CHUNK = 16384  # positions whose columns are about as large as the gradient of a map


def forward(
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
    """The convolution; arguments and result are those of `deform_conv2d`, without autograd."""
    features = input.permute(0, 2, 3, 1).contiguous()
    steering = _Steering(offset, mask, weight.shape[2:], stride, padding, dilation)
    out = features.new_empty((*steering.shape, weight.shape[0]))
    matrices = _matrices(weight, groups)
    chunk = CACHE_CHUNK if features.device.type == "cpu" else MEMORY_CHUNK
    for images, rows in _chunks(steering.shape, chunk):
        samples = steering.samples(features[images], images, rows)
        _multiply(samples.columns(), matrices, out[images, rows].flatten(0, 2))
    if bias is not None:
        out += bias
    return out.permute(0, 3, 1, 2)


def backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, offset, mask and weight; None for those that are not needed."""
    features, grad_out = input.permute(0, 2, 3, 1).contiguous(), grad_out.permute(0, 2, 3, 1)
    steering = _Steering(offset, mask, weight.shape[2:], stride, padding, dilation)
    sampling_shape = (*steering.shape, steering.taps)
    wide = torch.promote_types(input.dtype, torch.float32)
    grad_input = features.new_zeros(features.shape, dtype=wide) if needs_input else None
    grad_offset = offset.new_empty((*sampling_shape, 2)) if needs_sampling else None
    needs_mask = needs_sampling and mask is not None
    grad_mask = mask.new_empty(sampling_shape) if needs_mask else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    matrices = _matrices(weight, groups)
    for images, rows in _chunks(steering.shape, MEMORY_CHUNK):
        samples = steering.samples(features[images], images, rows)
        part = grad_out[images, rows].flatten(0, 2)
        if needs_weight:
            grad_weight += _weight_grad(part, samples.columns(), weight, groups)
        if not (needs_input or needs_sampling):
            continue
        grad_columns = _column_grad(part, matrices, steering.taps)
        grad_table, grads = samples.backward(grad_columns, needs_input, needs_sampling)
        if needs_input:
            grad_input[images] += grad_table.view_as(grad_input[images])
        if needs_sampling:
            grad_offset[images, rows], grad_modulation = grads
        if needs_mask:
            grad_mask[images, rows] = grad_modulation
    return (
        None if grad_input is None else grad_input.to(input.dtype).permute(0, 3, 1, 2),
        None if grad_offset is None else grad_offset.flatten(3).permute(0, 3, 1, 2),
        None if grad_mask is None else grad_mask.permute(0, 3, 1, 2),
        grad_weight,
    )


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


class _Steering:
    """Offsets and modulations as (B, Ho, Wo, taps, …), and where the taps lie without them."""

    def __init__(
        self,
        offset: Tensor,
        mask: Tensor | None,
        kernel: tuple[int, int],
        stride: int,
        padding: int,
        dilation: int,
    ) -> None:
        self.taps = kernel[0] * kernel[1]
        self.dtype = torch.promote_types(offset.dtype, torch.float32)
        self.offset = offset.permute(0, 2, 3, 1).unflatten(-1, (self.taps, 2))
        self.mask = None if mask is None else mask.permute(0, 2, 3, 1)
        self.shape = self.offset.shape[:3]
        _, height, width = self.shape

        def grid(count: int, step: int) -> Tensor:
            return torch.arange(count, device=offset.device, dtype=self.dtype) * step

        tap_y = grid(kernel[0], dilation).repeat_interleave(kernel[1]) - padding
        tap_x = grid(kernel[1], dilation).repeat(kernel[0]) - padding
        self.y = grid(height, stride)[:, None, None] + tap_y  # (Ho, 1, taps)
        self.x = grid(width, stride)[:, None] + tap_x  # (Wo, taps)

    def samples(self, features: Tensor, images: slice, rows: slice) -> "_Samples":
        """What some rows of some images sample from these images' features (b, H, W, C)."""
        offset = self.offset[images, rows].to(self.dtype)
        modulation = None if self.mask is None else self.mask[images, rows].to(self.dtype)
        return _Samples(
            features, offset[..., 0] + self.y[rows], offset[..., 1] + self.x, modulation
        )


class _Samples:
    """The samples of some output positions: y, x and modulation are (b, rows, Wo, taps)."""

    def __init__(self, features: Tensor, y: Tensor, x: Tensor, modulation: Tensor | None) -> None:
        batch, height, width, channels = features.shape
        self.place = (y, x, height, width)
        self.modulation = modulation
        index, self.bilinear = bilinear_corners(y, x, height, width, width)  # (…, taps, 4)
        if batch > 1:
            first = torch.arange(batch, device=y.device, dtype=index.dtype) * (height * width)
            index = index + first[:, None, None, None, None]
        weight = self.bilinear if modulation is None else self.bilinear * modulation[..., None]
        self.table = features.reshape(batch * height * width, channels)
        self.index, self.weight = index.flatten(0, -2), weight.flatten(0, -2)
        self.taps = y.shape[-1]

    def columns(self) -> Tensor:
        """(positions, taps, C)."""
        return weighted_gather(self.table, self.index, self.weight).unflatten(0, (-1, self.taps))

    def backward(
        self, grad_columns: Tensor, needs_table: bool, needs_sampling: bool
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor | None] | None]:
        """Gradient of the table, and of offset (b, rows, Wo, taps, 2) and modulation."""
        grad_table, grad = weighted_gather_backward(
            *(grad_columns.flatten(0, 1), self.table, self.index, self.weight),
            *(needs_table, needs_sampling),
        )
        if not needs_sampling:
            return grad_table, None
        grad = grad.view_as(self.bilinear)
        grad_modulation = None
        if self.modulation is not None:
            grad_modulation = (grad * self.bilinear).sum(dim=-1)
            grad = grad * self.modulation[..., None]
        grad_offset = torch.stack(bilinear_corners_backward(grad, *self.place), dim=-1)
        return grad_table, (grad_offset, grad_modulation)


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


def _multiply(columns: Tensor, matrices: Tensor, out: Tensor) -> None:
    """Columns (positions, taps, C) times the matrices to the output (positions, C_out)."""
    groups = len(matrices)
    if groups == 1 and columns.dtype != torch.float16:
        torch.mm(columns.flatten(1), matrices[0].t(), out=out)
        return
    product = _matmul(_grouped(columns, groups), matrices.transpose(1, 2))
    out.unflatten(1, (groups, -1)).copy_(product.transpose(0, 1))


def _column_grad(grad_out: Tensor, matrices: Tensor, taps: int) -> Tensor:
    """Gradient of the columns (positions, taps, C) from that of the output."""
    groups = len(matrices)
    per_group = grad_out.unflatten(1, (groups, -1)).transpose(0, 1)
    grad = _matmul(per_group, matrices)  # (groups, positions, taps · C / groups)
    grad = grad.unflatten(2, (taps, -1))  # (groups, positions, taps, C / groups)
    return grad[0] if groups == 1 else grad.permute(1, 2, 0, 3).flatten(2)


def _weight_grad(grad_out: Tensor, columns: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of the weight, in its own shape."""
    per_group = grad_out.unflatten(1, (groups, -1)).permute(1, 2, 0)
    grad = _matmul(per_group, _grouped(columns, groups))  # (groups, C_out / groups, taps · C / …)
    out_channels, channels = weight.shape[:2]
    return grad.view(out_channels, -1, channels).transpose(1, 2).reshape(weight.shape)
