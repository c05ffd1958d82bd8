"""Modulated deformable convolution as an implicit GEMM: samples are computed inside the matrix
products, forward and backward, so the im2col matrix is never written to memory.

Each forward program computes a tile of output positions. For each kernel tap it computes the four
neighbours of the sampling positions once, then loops over channels: gather, weight, multiply on the
tensor cores. Groups too narrow for the tensor cores are packed into a block-diagonal weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plain.packing import groups_per_pack, pack, unpack
from .launch import on_device_of_first
from .sampling import INTERPRETED, add_rows, corners, dot_dtype, load_rows

__all__ = ["backward", "forward"]

PACKED_CHANNELS = 64  # most input or output channels of several groups packed into one
WEIGHT_SPLITS = 8  # split-K of the weight gradient: number of partial sums over the positions
# arguments that depend on the size of the image, see launch.py
SIZES = ["positions", "height", "width", "out_height", "out_width"]
SIZES += ["so_image", "so_row", "sm_image", "sm_row"]  # strides of offset and mask


@triton.jit
def _position(tile, out_height, out_width, positions, BLOCK_M: tl.constexpr):
    """Return flat index, image, row and column of a tile's output positions, and their mask."""
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    exists = index < positions
    area = out_height * out_width
    image = index // area
    rest = index - image * area
    row = rest // out_width
    return index, image, row, rest - row * out_width, exists


@triton.jit
def _tap(
    offset, mask, image, row, column, exists, tap, height, width,
    so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
    KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return the four neighbours that a tap samples (see `corners`), and its modulation."""
    at = offset + image * so_image + row * so_row + column * so_column + 2 * tap * so_tap
    y = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(at + so_tap, mask=exists, other=0.0).to(tl.float32)
    tap_row = tap // KERNEL_WIDTH
    y += (row * STRIDE - PADDING + tap_row * DILATION).to(tl.float32)
    x += (column * STRIDE - PADDING + (tap - tap_row * KERNEL_WIDTH) * DILATION).to(tl.float32)
    y0, x0, fy, fx, top, bottom, left, right = corners(y, x, height, width)
    top, bottom = top & exists, bottom & exists
    if HAS_MASK:
        at = mask + image * sm_image + row * sm_row + column * sm_column + tap * sm_tap
        modulation = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        modulation = tl.full(fy.shape, 1.0, tl.float32)
    return y0, x0, fy, fx, top, bottom, left, right, modulation


@triton.jit
def _columns(
    pointer, fy, fx, top, bottom, left, right, modulation, channel_exists, sx_row, sx_column
):
    """Return the samples, weighted sums of four neighbours: (BLOCK_M, BLOCK_K) float32."""
    upper, lower = (1.0 - fy) * modulation, fy * modulation
    columns = load_rows(pointer, top & left, channel_exists) * (upper * (1.0 - fx))[:, None]
    columns += load_rows(pointer + sx_column, top & right, channel_exists) * (upper * fx)[:, None]
    pointer += sx_row
    columns += load_rows(pointer, bottom & left, channel_exists) * (lower * (1.0 - fx))[:, None]
    columns += (
        load_rows(pointer + sx_column, bottom & right, channel_exists) * (lower * fx)[:, None]
    )
    return columns


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, offset, mask, weight, bias, out,
    positions, height, width, out_height, out_width, channels_out,
    sx_image, sx_row, sx_column,
    so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
    TAPS: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP_K: tl.constexpr, GROUP_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    index, image, row, column, exists = _position(
        tl.program_id(0), out_height, out_width, positions, BLOCK_M
    )
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_exists = n < GROUP_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        y0, x0, fy, fx, top, bottom, left, right, modulation = _tap(
            offset, mask, image, row, column, exists, tap, height, width,
            so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
            KERNEL_WIDTH, STRIDE, PADDING, DILATION, HAS_MASK,
        )  # fmt: skip
        pixel = input + image * sx_image + y0.to(tl.int64) * sx_row + x0 * sx_column
        pixel += group * GROUP_K
        for first in range(0, GROUP_K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_exists = k < GROUP_K
            columns = _columns(
                pixel[:, None] + k[None, :],
                fy, fx, top, bottom, left, right, modulation, k_exists, sx_row, sx_column,
            )  # fmt: skip
            at = weight + ((group * TAPS + tap) * GROUP_K + k)[:, None] * GROUP_N + n[None, :]
            part = tl.load(at, mask=k_exists[:, None] & n_exists[None, :], other=0.0)
            total = tl.dot(columns.to(DOT), part.to(DOT), total, input_precision=PRECISION)
    n_out = group * GROUP_N + n
    if HAS_BIAS:
        total += tl.load(bias + n_out, mask=n_exists, other=0.0).to(tl.float32)[None, :]
    at = out + index[:, None] * channels_out + n_out[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=exists[:, None] & n_exists[None, :])


@triton.jit(do_not_specialize=SIZES)
def _sample_grad_kernel(
    grad_out, input, offset, mask, weight, grad_input, grad_offset, grad_mask,
    positions, height, width, out_height, out_width, channels, channels_out,
    sx_image, sx_row, sx_column,
    so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
    TAPS: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, HAS_MASK: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_N: tl.constexpr,
    NEEDS_INPUT: tl.constexpr, NEEDS_SAMPLING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the input (with atomic adds), the offsets and the modulations."""
    index, image, row, column, exists = _position(
        tl.program_id(0), out_height, out_width, positions, BLOCK_M
    )
    tap = tl.program_id(1)
    y0, x0, fy, fx, top, bottom, left, right, modulation = _tap(
        offset, mask, image, row, column, exists, tap, height, width,
        so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
        KERNEL_WIDTH, STRIDE, PADDING, DILATION, HAS_MASK,
    )  # fmt: skip
    upper, lower = (1.0 - fy) * modulation, fy * modulation
    read = image * sx_image + y0.to(tl.int64) * sx_row + x0 * sx_column
    write = ((image * height + y0) * width + x0) * channels
    # the gradient of the sample times each neighbour, summed over channels
    at_upper_left = tl.zeros([BLOCK_M], tl.float32)
    at_upper_right = tl.zeros([BLOCK_M], tl.float32)
    at_lower_left = tl.zeros([BLOCK_M], tl.float32)
    at_lower_right = tl.zeros([BLOCK_M], tl.float32)
    for group in range(GROUPS):
        for first in range(0, GROUP_K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            k_exists = k < GROUP_K
            grad = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for first_n in range(0, GROUP_N, BLOCK_N):
                n = first_n + tl.arange(0, BLOCK_N)
                n_exists = n < GROUP_N
                at = grad_out + index[:, None] * channels_out + (group * GROUP_N + n)[None, :]
                upstream = tl.load(at, mask=exists[:, None] & n_exists[None, :], other=0.0)
                at = weight + ((group * TAPS + tap) * GROUP_K + k)[None, :] * GROUP_N + n[:, None]
                part = tl.load(at, mask=n_exists[:, None] & k_exists[None, :], other=0.0)
                grad = tl.dot(upstream.to(DOT), part.to(DOT), grad, input_precision=PRECISION)
            channel = group * GROUP_K + k
            if NEEDS_SAMPLING:
                at = input + read[:, None] + channel[None, :]
                at_upper_left += tl.sum(grad * load_rows(at, top & left, k_exists), 1)
                at_upper_right += tl.sum(grad * load_rows(at + sx_column, top & right, k_exists), 1)
                at += sx_row
                at_lower_left += tl.sum(grad * load_rows(at, bottom & left, k_exists), 1)
                at_lower_right += tl.sum(
                    grad * load_rows(at + sx_column, bottom & right, k_exists), 1
                )
            if NEEDS_INPUT:
                at = grad_input + write[:, None] + channel[None, :]
                add_rows(at, grad, upper * (1.0 - fx), top & left, k_exists)
                add_rows(at + channels, grad, upper * fx, top & right, k_exists)
                at += width * channels
                add_rows(at, grad, lower * (1.0 - fx), bottom & left, k_exists)
                add_rows(at + channels, grad, lower * fx, bottom & right, k_exists)
    if NEEDS_SAMPLING:
        left_change, right_change = at_lower_left - at_upper_left, at_lower_right - at_upper_right
        upper_change, lower_change = at_upper_right - at_upper_left, at_lower_right - at_lower_left
        at = grad_offset + (index * TAPS + tap) * 2
        tl.store(at, modulation * ((1.0 - fx) * left_change + fx * right_change), mask=exists)
        tl.store(at + 1, modulation * ((1.0 - fy) * upper_change + fy * lower_change), mask=exists)
        if HAS_MASK:
            value = (1.0 - fy) * ((1.0 - fx) * at_upper_left + fx * at_upper_right)
            value += fy * ((1.0 - fx) * at_lower_left + fx * at_lower_right)
            tl.store(grad_mask + index * TAPS + tap, value, mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "tiles_per_split"])
def _weight_grad_kernel(
    grad_out, input, offset, mask, grad_weight,
    positions, height, width, out_height, out_width, channels_out, tiles_per_split,
    sx_image, sx_row, sx_column,
    so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
    TAPS: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, HAS_MASK: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_N: tl.constexpr, BLOCKS_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the packed weight over one split of the positions."""
    block, split = tl.program_id(0), tl.program_id(2)
    group, tap = tl.program_id(1) // TAPS, tl.program_id(1) % TAPS
    k = (block // BLOCKS_N) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (block % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_exists, n_exists = k < GROUP_K, n < GROUP_N
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        index, image, row, column, exists = _position(
            tile, out_height, out_width, positions, BLOCK_M
        )
        y0, x0, fy, fx, top, bottom, left, right, modulation = _tap(
            offset, mask, image, row, column, exists, tap, height, width,
            so_image, so_tap, so_row, so_column, sm_image, sm_tap, sm_row, sm_column,
            KERNEL_WIDTH, STRIDE, PADDING, DILATION, HAS_MASK,
        )  # fmt: skip
        pixel = input + image * sx_image + y0.to(tl.int64) * sx_row + x0 * sx_column
        pixel += group * GROUP_K
        columns = _columns(
            pixel[:, None] + k[None, :],
            fy, fx, top, bottom, left, right, modulation, k_exists, sx_row, sx_column,
        )  # fmt: skip
        at = grad_out + index[:, None] * channels_out + (group * GROUP_N + n)[None, :]
        upstream = tl.load(at, mask=exists[:, None] & n_exists[None, :], other=0.0)
        total = tl.dot(
            tl.trans(columns.to(DOT)), upstream.to(DOT), total, input_precision=PRECISION
        )
    at = (((split * GROUPS + group) * TAPS + tap) * GROUP_K + k)[:, None] * GROUP_N + n[None, :]
    tl.store(grad_weight + at, total, mask=k_exists[:, None] & n_exists[None, :])


def _pack(weight: Tensor, groups: int) -> Tensor:
    """Pack narrow groups, (C_out, C / groups, kh, kw) to (packs, taps, K, N)."""
    widest = max(weight.shape[1], weight.shape[0] // groups)
    together = groups_per_pack(groups, widest, PACKED_CHANNELS)
    packed = pack(weight, groups, together).flatten(2)
    return packed.unflatten(0, (groups // together, -1)).permute(0, 3, 2, 1).contiguous()


def _unpack(packed: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Invert `_pack`, to a weight of the given shape."""
    weight = packed.permute(0, 3, 2, 1).flatten(0, 1).unflatten(2, shape[2:])
    return unpack(weight, shape, groups)


def _blocks(group_n: int, group_k: int, max_n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return BLOCK_N and BLOCK_K, the output and input channels of a tile.

    Tiles fit into the registers and shared memory of Ampere and later GPUs; float32 tiles have half
    as many channels.
    """
    divisor = 2 if dtype == torch.float32 else 1
    return _block(group_n, max_n // divisor), _block(group_k, 64 // divisor)


def _block(size: int, max_size: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), max_size)


def _precision(input: Tensor) -> str:
    """Return `input_precision` of `tl.dot`: TF32 where cuDNN convolutions are allowed to use it."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if input.dtype == torch.float32 and allowed else "ieee"


def _strides(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Return the strides of image, tap, row and column."""
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


@on_device_of_first
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
    input = input.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    batch, _, height, width = input.shape
    _, _, out_height, out_width = offset.shape
    channels_out, _, _, kernel_width = weight.shape
    out = input.new_empty(batch, out_height, out_width, channels_out)
    packed = _pack(weight, groups)
    packs, taps, group_k, group_n = packed.shape
    block_n, block_k = _blocks(group_n, group_k, 256, input.dtype)
    block_m, positions = 64, batch * out_height * out_width
    grid = (triton.cdiv(positions, block_m), triton.cdiv(group_n, block_n), packs)
    if out.numel():
        _forward_kernel[grid](
            input, offset, mask, packed, bias, out,
            positions, height, width, out_height, out_width, channels_out,
            input.stride(0), input.stride(2), input.stride(3),
            *_strides(offset), *_strides(mask),
            taps, kernel_width, stride, padding, dilation, mask is not None, bias is not None,
            group_k, group_n, block_m, block_n, block_k, dot_dtype(input.dtype),
            _precision(input), num_warps=8 if block_n > 64 else 4, num_stages=2,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


@on_device_of_first
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
    """Return the gradients of input, offset, mask and weight; None for those not needed.

    The gradient of the input is accumulated with atomic adds, so it is not deterministic.
    """
    input = input.contiguous(memory_format=torch.channels_last)
    grad_out = grad_out.permute(0, 2, 3, 1).contiguous()
    batch, channels, height, width = input.shape
    _, out_height, out_width, channels_out = grad_out.shape
    packed = _pack(weight, groups)
    packs, taps, group_k, group_n = packed.shape
    kernel_width = weight.shape[3]
    positions = batch * out_height * out_width
    block_n, block_k = _blocks(group_n, group_k, 128, input.dtype)
    sizes = (positions, height, width, out_height, out_width)
    strides = (
        *(input.stride(0), input.stride(2), input.stride(3)),
        *(*_strides(offset), *_strides(mask)),
    )
    geometry = (taps, kernel_width, stride, padding, dilation, mask is not None)
    products = (dot_dtype(input.dtype), _precision(input))

    grad_input = grad_offset = grad_mask = grad_weight = None
    if needs_input:
        grad_input = input.new_zeros((batch, height, width, channels), dtype=torch.float32)
    if needs_sampling:
        shape = (batch, out_height, out_width, taps)
        grad_offset = input.new_empty((*shape, 2), dtype=torch.float32)
        grad_mask = None if mask is None else input.new_empty(shape, dtype=torch.float32)
    if (needs_input or needs_sampling) and positions:
        block_m = 64
        _sample_grad_kernel[triton.cdiv(positions, block_m), taps](
            grad_out, input, offset, mask, packed, grad_input, grad_offset, grad_mask,
            *sizes, channels, channels_out, *strides, *geometry,
            packs, group_k, group_n, needs_input, needs_sampling,
            block_m, block_n, block_k, *products, num_warps=8, num_stages=2,
        )  # fmt: skip
    if needs_weight:
        block_m = 32
        tiles = triton.cdiv(positions, block_m)
        splits = 1 if INTERPRETED else max(1, min(WEIGHT_SPLITS, tiles // 16))
        partial = input.new_empty((splits, *packed.shape), dtype=torch.float32)
        blocks_k, blocks_n = triton.cdiv(group_k, block_k), triton.cdiv(group_n, block_n)
        _weight_grad_kernel[blocks_k * blocks_n, packs * taps, splits](
            grad_out, input, offset, mask, partial,
            *sizes, channels_out, triton.cdiv(tiles, splits), *strides, *geometry,
            packs, group_k, group_n, blocks_n,
            block_m, block_n, block_k, *products, num_warps=4, num_stages=2,
        )  # fmt: skip
        grad_weight = _unpack(partial.sum(0), weight.shape, groups).to(weight.dtype).contiguous()
    return (
        None if grad_input is None else grad_input.to(input.dtype).permute(0, 3, 1, 2),
        None if grad_offset is None else grad_offset.flatten(3).permute(0, 3, 1, 2),
        None if grad_mask is None else grad_mask.permute(0, 3, 1, 2),
        grad_weight,
    )
