"""Deformable convolution as a gather and a matrix product, in plain PyTorch, for any device.

The sampled columns are made and multiplied chunk by chunk, so that on a CPU they stay in cache; the
backward pass makes them again, so that nothing but the inputs is kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import product
from .bilinear import BilinearSamples
from .gather import add_table_gradient, weight_gradient, weighted_gather

__all__ = ["backward", "forward"]

BLOCK = 16384  # output positions whose samples are prepared together
PACK = 32  # input channels that groups are packed to


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
    features = _features(input)
    out = input.new_empty((*offset.shape[:1], *offset.shape[2:], weight.shape[0]))
    matrices = _matrices(*_packed(weight, groups))
    geometry = (weight.shape[2:], stride, padding, dilation)
    for block in _blocks(features, offset, mask, geometry):
        block_out = out[block.images, block.rows].flatten(0, 2)
        for chunk in block.chunks(len(matrices)):
            _multiply(block.columns(chunk), matrices, block_out[chunk])
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
    features, grad_out = _features(input), grad_out.permute(0, 2, 3, 1)
    # bfloat16 loses most of what is added to it, and of what differs little
    wide = features.to(torch.promote_types(input.dtype, torch.float32))
    grad_input = torch.zeros_like(wide) if needs_input else None
    grad_offset, grad_mask = (
        torch.empty_like(t, memory_format=torch.channels_last)
        if needs_sampling and t is not None
        else None
        for t in (offset, mask)
    )
    packed, packs = _packed(weight, groups)
    matrices = _matrices(packed, packs)
    grad_matrices = torch.zeros_like(matrices, dtype=wide.dtype) if needs_weight else None
    geometry = (weight.shape[2:], stride, padding, dilation)
    for block in _blocks(features, offset, mask, geometry):
        block_grad = grad_out[block.images, block.rows].flatten(0, 2)
        for chunk in block.chunks(len(matrices)):
            grad = block_grad[chunk]
            if needs_weight:
                grad_matrices += _matrices_grad(grad, block.columns(chunk), packs)
            if needs_input or needs_sampling:
                grad_columns = _column_grad(grad, matrices, block.taps).to(wide.dtype)
            if needs_input:
                block.add_input_gradient(grad_input, grad_columns, chunk)
            if needs_sampling:
                block.keep_weight_gradient(wide, grad_columns, chunk)
        if needs_sampling:
            block.write_sampling_gradients(grad_offset, grad_mask)
    grad_weight = None
    if needs_weight:
        # the inverse of `_matrices`
        grad_packed = grad_matrices.view(weight.shape[0], -1, packed.shape[1]).transpose(1, 2)
        grad_weight = _blocks_on_diagonal(
            grad_packed.reshape(packed.shape), weight.shape[1], groups
        )
        grad_weight = grad_weight.reshape(weight.shape).contiguous()
    return (
        None if grad_input is None else grad_input.to(input.dtype).permute(0, 3, 1, 2),
        grad_offset,
        grad_mask,
        grad_weight,
    )


def _columns_bytes() -> int:
    """Bytes of the columns of a chunk on a CPU: few enough to stay in its cache, as many as keep
    the product busy."""
    return (32 if product.mkl_is_slow() else 16) * 2**20


def _features(input: Tensor) -> Tensor:
    """(B, H, W, C), contiguous: what is gathered."""
    return input.detach().permute(0, 2, 3, 1).contiguous()


def _blocks(
    features: Tensor, offset: Tensor, mask: Tensor | None, geometry: tuple
) -> Iterator["_Block"]:
    """Splits the output into whole images, or into whole rows of one image."""
    batch, _, height, width = offset.shape
    if height * width == 0:
        return
    images = max(1, BLOCK // (height * width))
    rows = max(1, BLOCK // width) if images == 1 else height
    for first in range(0, batch, images):
        for row in range(0, height, rows):
            part = slice(first, min(first + images, batch)), slice(row, min(row + rows, height))
            yield _Block(features, offset, mask, *part, *geometry)


class _Block:
    """Some rows of some images of the output, and the samples that they are made of.

    Args:
        features: (B, H, W, C), contiguous.
        offset, mask: as given to `deform_conv2d`.
        images, rows: which part of the output it is.
        kernel, stride, padding, dilation: of the convolution.
    """

    def __init__(
        self,
        features: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        images: slice,
        rows: slice,
        kernel: tuple[int, int],
        stride: int,
        padding: int,
        dilation: int,
    ) -> None:
        self.images, self.rows, self.taps = images, rows, kernel[0] * kernel[1]
        dtype = torch.promote_types(offset.dtype, torch.float32)
        modulation = None if mask is None else self._part(mask).to(dtype)  # (b, rows, Wo, taps)
        offset = self._part(offset).to(dtype).unflatten(-1, (self.taps, 2))

        def places(first: int, last: int) -> Tensor:
            return torch.arange(first, last, device=offset.device, dtype=dtype)

        tap_y = places(0, kernel[0]).repeat_interleave(kernel[1]) * dilation - padding
        tap_x = places(0, kernel[1]).repeat(kernel[0]) * dilation - padding
        y = places(rows.start, rows.stop)[:, None, None] * stride + tap_y  # (rows, 1, taps)
        x = places(0, offset.shape[2])[:, None] * stride + tap_x  # (Wo, taps)
        y, x = (offset[..., 0] + y).contiguous(), (offset[..., 1] + x).contiguous()

        _, height, width, channels = features.shape
        self.samples = BilinearSamples(y, x, height, width, modulation)
        index = self.samples.index(width)
        for image in range(1, len(index)):
            index[image] += image * height * width
        self.table = features[images].reshape(-1, channels)
        self.index = index.flatten(0, 2).flatten(1)  # (positions, taps · 4)
        self.weight = self.samples.weight().flatten(0, 2).flatten(1)
        self.grad_weight: Tensor | None = None

    def _part(self, tensor: Tensor) -> Tensor:
        """This block of a (B, channels, Ho, Wo) tensor, channels last."""
        return tensor.permute(0, 2, 3, 1)[self.images, self.rows]

    def chunks(self, groups: int) -> Iterator[slice]:
        """Positions of the block the columns of which are made at once; those of several groups
        are copied for their product."""
        positions = step = len(self.index)
        if self.table.device.type == "cpu":
            column = self.taps * self.table.shape[1] * max(4, self.table.itemsize)  # as gradients
            step = max(1, _columns_bytes() // (column * min(groups, 2)))
        for first in range(0, positions, step):
            yield slice(first, min(first + step, positions))

    def _of_taps(self, values: Tensor, chunk: slice) -> Tensor:
        """A row for each tap of each position of a chunk."""
        return values[chunk].view(-1, 4)

    def columns(self, chunk: slice) -> Tensor:
        """(positions, taps, C), in the dtype of the features."""
        index, weight = self._of_taps(self.index, chunk), self._of_taps(self.weight, chunk)
        return weighted_gather(self.table, index, weight).unflatten(0, (-1, self.taps))

    def add_input_gradient(self, grad_input: Tensor, grad_columns: Tensor, chunk: slice) -> None:
        """Adds to that of the features, (B, H, W, C), what comes from a chunk's columns."""
        index, weight = self._of_taps(self.index, chunk), self._of_taps(self.weight, chunk)
        grad_table = grad_input[self.images].view(self.table.shape)
        add_table_gradient(grad_table, grad_columns.flatten(0, 1), index, weight)

    def keep_weight_gradient(self, features: Tensor, grad_columns: Tensor, chunk: slice) -> None:
        """Keeps that of the samples' weights, for `write_sampling_gradients`; features (B, H, W, C)
        in the dtype of the gradient."""
        if self.grad_weight is None:
            self.grad_weight = torch.empty_like(self.weight)
        grad = weight_gradient(
            grad_columns.flatten(0, 1),
            features[self.images].view(self.table.shape),
            self._of_taps(self.index, chunk),
        )
        self.grad_weight[chunk] = grad.view(-1, self.taps * 4)

    def write_sampling_gradients(self, grad_offset: Tensor, grad_mask: Tensor | None) -> None:
        """Stores those of offsets and modulations, when all chunks are through."""
        grad_weight = self.grad_weight.view(*self.samples.shape, 4)
        grad_y, grad_x, grad_modulation = self.samples.backward(grad_weight)
        part = self._part(grad_offset).unflatten(-1, (self.taps, 2))
        part[..., 0], part[..., 1] = grad_y, grad_x
        if grad_mask is not None:
            self._part(grad_mask)[...] = grad_modulation


def _packed(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """An equal weight in fewer groups, for finite features: on a CPU small groups are packed
    block-diagonally, as a product of few columns keeps no vector unit busy."""
    channels, together = weight.shape[1], 1
    for count in range(2, groups + 1):
        if groups % count == 0 and count * channels <= PACK:
            together = count
    if together == 1 or weight.device.type != "cpu":
        return weight, groups
    packed = weight.new_zeros((weight.shape[0], together * channels, *weight.shape[2:]))
    blocks = _blocks_on_diagonal(packed, channels, groups)
    blocks.copy_(weight.reshape(blocks.shape))
    return packed, groups // together


def _blocks_on_diagonal(packed: Tensor, channels: int, groups: int) -> Tensor:
    """What a packed weight has of each group: a view, (packs, groups in one, C_out / groups,
    channels, kh, kw)."""
    together = packed.shape[1] // channels
    blocks = packed.unflatten(0, (groups // together, together, -1)).unflatten(3, (together, -1))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _matrices(weight: Tensor, groups: int) -> Tensor:
    """(C_out, C / groups, kh, kw) to (groups, C_out / groups, taps · C / groups)."""
    return weight.flatten(2).transpose(1, 2).flatten(1).unflatten(0, (groups, -1))


def _grouped(columns: Tensor, groups: int) -> Tensor:
    """(positions, taps, C) to (groups, positions, taps · C / groups)."""
    if groups == 1:
        return columns.flatten(1)[None]
    return columns.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)


def _multiply(columns: Tensor, matrices: Tensor, out: Tensor) -> None:
    """Columns (positions, taps, C) times the matrices to the output (positions, C_out)."""
    groups = len(matrices)
    if groups == 1:
        product.product(columns.flatten(1), matrices[0], out)
        return
    result = product.grouped_product(_grouped(columns, groups), matrices.transpose(1, 2))
    out.unflatten(1, (groups, -1)).copy_(result.transpose(0, 1))


def _column_grad(grad_out: Tensor, matrices: Tensor, taps: int) -> Tensor:
    """Gradient of the columns (positions, taps, C) from that of the output."""
    groups = len(matrices)
    if groups == 1:
        return product.row_gradient(grad_out, matrices[0]).unflatten(1, (taps, -1))
    per_group = grad_out.unflatten(1, (groups, -1)).transpose(0, 1)
    grad = product.grouped_product(per_group, matrices)  # (groups, positions, taps · C / groups)
    return grad.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).flatten(2)


def _matrices_grad(grad_out: Tensor, columns: Tensor, groups: int) -> Tensor:
    """Gradient of the matrices."""
    if groups == 1:
        return product.weight_gradient(grad_out, columns.flatten(1))[None]
    per_group = grad_out.unflatten(1, (groups, -1)).permute(1, 2, 0)
    return product.grouped_product(per_group, _grouped(columns, groups))
