"""Deformable convolution as a gather and a matrix product, in plain PyTorch, for any device.

The sampled columns are computed and multiplied chunk by chunk to stay in the cache of a CPU. The
backward pass recomputes them, so only the inputs are saved.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import product
from .bilinear import BilinearSamples
from .gather import add_table_gradient, weight_gradient, weighted_gather
from .packing import groups_per_pack, pack, unpack

__all__ = ["backward", "forward"]

BLOCK = 16384  # output positions whose samples are computed together
PACK = 32  # largest number of input channels of packed groups


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
    """Compute `dynamic_detr.ops.deform_conv2d` without autograd."""
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
    """Return the gradients of input, offset, mask and weight; None for those not needed."""
    features, grad_out = _features(input), grad_out.permute(0, 2, 3, 1)
    # float32 at least: long sums and differences of close numbers lose too much in bfloat16
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
                block.store_weight_gradient(wide, grad_columns, chunk)
        if needs_sampling:
            block.write_sampling_gradients(grad_offset, grad_mask)
    grad_weight = None
    if needs_weight:
        # inverse of `_matrices`
        grad_packed = grad_matrices.view(weight.shape[0], -1, packed.shape[1]).transpose(1, 2)
        grad_weight = unpack(grad_packed.reshape(packed.shape), weight.shape, groups).contiguous()
    return (
        None if grad_input is None else grad_input.to(input.dtype).permute(0, 3, 1, 2),
        grad_offset,
        grad_mask,
        grad_weight,
    )


def _columns_bytes() -> int:
    """Return the size of a chunk's columns on a CPU: small enough for its cache, large enough for
    an efficient product."""
    return (32 if product.mkl_is_slow() else 16) * 2**20


def _features(input: Tensor) -> Tensor:
    """Return the input as a contiguous (B, H, W, C) tensor."""
    return input.detach().permute(0, 2, 3, 1).contiguous()


def _blocks(
    features: Tensor, offset: Tensor, mask: Tensor | None, geometry: tuple
) -> Iterator["_Block"]:
    """Split the output into whole images, or into whole rows of one image."""
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
    """Some rows of some images of the output, with the samples that they depend on.

    Args:
        features: (B, H, W, C), contiguous.
        offset, mask: arguments of `deform_conv2d`.
        images, rows: the block's part of the output.
        kernel: (kh, kw).
        stride, padding, dilation: as in `deform_conv2d`.
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

        def arange(start: int, end: int) -> Tensor:
            return torch.arange(start, end, device=offset.device, dtype=dtype)

        tap_y = arange(0, kernel[0]).repeat_interleave(kernel[1]) * dilation - padding
        tap_x = arange(0, kernel[1]).repeat(kernel[0]) * dilation - padding
        y = arange(rows.start, rows.stop)[:, None, None] * stride + tap_y  # (rows, 1, taps)
        x = arange(0, offset.shape[2])[:, None] * stride + tap_x  # (Wo, taps)
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
        """Return this block of a (B, channels, Ho, Wo) tensor, channels last."""
        return tensor.permute(0, 2, 3, 1)[self.images, self.rows]

    def chunks(self, groups: int) -> Iterator[slice]:
        """Split the positions of the block by the size of their columns, which are float32 or wider
        as gradients. Those of several groups are copied for the product, so they count twice."""
        positions = step = len(self.index)
        if self.table.device.type == "cpu":
            column = self.taps * self.table.shape[1] * max(4, self.table.itemsize)
            step = max(1, _columns_bytes() // (column * min(groups, 2)))
        for first in range(0, positions, step):
            yield slice(first, min(first + step, positions))

    def _of_taps(self, values: Tensor, chunk: slice) -> Tensor:
        """Return one row (4,) for each tap of each position of a chunk."""
        return values[chunk].view(-1, 4)

    def columns(self, chunk: slice) -> Tensor:
        """Return the samples of a chunk, (positions, taps, C) in the dtype of the features."""
        index, weight = self._of_taps(self.index, chunk), self._of_taps(self.weight, chunk)
        return weighted_gather(self.table, index, weight).unflatten(0, (-1, self.taps))

    def add_input_gradient(self, grad_input: Tensor, grad_columns: Tensor, chunk: slice) -> None:
        """Add the gradient through a chunk's columns to the features' gradient (B, H, W, C)."""
        index, weight = self._of_taps(self.index, chunk), self._of_taps(self.weight, chunk)
        grad_table = grad_input[self.images].view(self.table.shape)
        add_table_gradient(grad_table, grad_columns.flatten(0, 1), index, weight)

    def store_weight_gradient(self, features: Tensor, grad_columns: Tensor, chunk: slice) -> None:
        """Store the gradient of the samples' weights for `write_sampling_gradients`; `features`
        (B, H, W, C) must have the dtype of the gradient."""
        if self.grad_weight is None:
            self.grad_weight = torch.empty_like(self.weight)
        grad = weight_gradient(
            grad_columns.flatten(0, 1),
            features[self.images].view(self.table.shape),
            self._of_taps(self.index, chunk),
        )
        self.grad_weight[chunk] = grad.view(-1, self.taps * 4)

    def write_sampling_gradients(self, grad_offset: Tensor, grad_mask: Tensor | None) -> None:
        """Write the gradients of offsets and modulations, after all chunks."""
        grad_weight = self.grad_weight.view(*self.samples.shape, 4)
        grad_y, grad_x, grad_modulation = self.samples.backward(grad_weight)
        part = self._part(grad_offset).unflatten(-1, (self.taps, 2))
        part[..., 0], part[..., 1] = grad_y, grad_x
        if grad_mask is not None:
            self._part(grad_mask)[...] = grad_modulation


def _packed(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """Return an equivalent weight and its number of groups.

    On a CPU, narrow groups are packed: a product of few columns does not fill the vector units.
    """
    on_cpu = weight.device.type == "cpu"
    together = groups_per_pack(groups, weight.shape[1], PACK) if on_cpu else 1
    return pack(weight, groups, together), groups // together


def _matrices(weight: Tensor, groups: int) -> Tensor:
    """(C_out, C / groups, kh, kw) to (groups, C_out / groups, taps · C / groups)."""
    return weight.flatten(2).transpose(1, 2).flatten(1).unflatten(0, (groups, -1))


def _grouped(columns: Tensor, groups: int) -> Tensor:
    """(positions, taps, C) to (groups, positions, taps · C / groups)."""
    if groups == 1:
        return columns.flatten(1)[None]
    return columns.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)


def _multiply(columns: Tensor, matrices: Tensor, out: Tensor) -> None:
    """Write the product of columns (positions, taps, C) and matrices to out (positions, C_out)."""
    groups = len(matrices)
    if groups == 1:
        product.product(columns.flatten(1), matrices[0], out)
        return
    result = product.grouped_product(_grouped(columns, groups), matrices.transpose(1, 2))
    out.unflatten(1, (groups, -1)).copy_(result.transpose(0, 1))


def _column_grad(grad_out: Tensor, matrices: Tensor, taps: int) -> Tensor:
    """Return the gradient of the columns (positions, taps, C)."""
    groups = len(matrices)
    if groups == 1:
        return product.row_gradient(grad_out, matrices[0]).unflatten(1, (taps, -1))
    per_group = grad_out.unflatten(1, (groups, -1)).transpose(0, 1)
    grad = product.grouped_product(per_group, matrices)  # (groups, positions, taps · C / groups)
    return grad.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).flatten(2)


def _matrices_grad(grad_out: Tensor, columns: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return product.weight_gradient(grad_out, columns.flatten(1))[None]
    per_group = grad_out.unflatten(1, (groups, -1)).permute(1, 2, 0)
    return product.grouped_product(per_group, _grouped(columns, groups))
