"""RoIAlign over a feature pyramid (equation 8), for all boxes of all images in one operator.

Each box is pooled from the level that suits its size. Unlike torchvision's operator, samples are
clamped at the true edge of each image, so the result does not depend on the padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import kernel_serves
from .check import check_at_least, check_spatial_shapes, check_tensor
from .plain import roi_align as plain
from .plain.gather import rows_of

__all__ = ["pyramid_roi_align"]


def pyramid_roi_align(
    table: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Tensor,
    boxes: Tensor,
    output_size: int = 7,
    sampling_ratio: int = 2,
    canonical_size: float = plain.CANONICAL_SIZE,
) -> Tensor:
    """Pool an R×R grid of features from each box.

    Each bin is the mean of sampling_ratio² bilinear samples with `aligned=True` (shifted by half a
    pixel). Samples up to one pixel outside the true level are clamped to its edge; those further
    outside, or not finite, are zero. Boxes get no gradient.

    Second derivatives are not supported. On a GPU, atomic additions make the gradient of the
    features differ slightly between runs; `torch.use_deterministic_algorithms` selects the plain
    backward pass, which is slower.

    Args:
        table: (B, ΣHW, C), the levels concatenated, each in row-major order (`Pyramid.table`).
        spatial_shapes: (H, W) of each of the L levels.
        strides: stride of each level in pixels of the image, each twice the one before.
        image_sizes: (B, 2) integers, true (height, width) of each image in pixels.
        boxes: (B, Q, 4) corners in pixels of the unpadded image.
        output_size: bins R per side.
        sampling_ratio: samples per side of a bin.
        canonical_size: see `assign_levels`.

    Returns:
        (B, Q, R·R, C), bins in row-major order, in the dtype of `table`, also under autocast.
        Positions and weights are computed in float32 or wider.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    _check(table, spatial_shapes, strides, image_sizes, boxes)
    check_at_least("pyramid_roi_align", 1, output_size=output_size, sampling_ratio=sampling_ratio)
    if not canonical_size > 0:
        raise ValueError(
            f"pyramid_roi_align: canonical_size: expected a positive number, got {canonical_size!r}"
        )
    with torch.autocast(boxes.device.type, enabled=False):
        return _forward(
            table,
            boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)),
            image_sizes,
            [side for shape in spatial_shapes for side in shape],
            list(strides),
            output_size,
            sampling_ratio,
            float(canonical_size),
        )


def _check(table, spatial_shapes, strides, image_sizes, boxes) -> None:
    name, device = "pyramid_roi_align", table.device
    check_spatial_shapes(f"{name}: spatial_shapes", spatial_shapes)
    if len(strides) != len(spatial_shapes):
        raise ValueError(
            f"{name}: strides: expected one for each of {len(spatial_shapes)} levels, "
            f"got {tuple(strides)}"
        )
    positions = sum(height * width for height, width in spatial_shapes)
    check_tensor(f"{name}: table", table, ("B", positions, "C"))
    check_tensor(f"{name}: image_sizes", image_sizes, (len(table), 2), device, integer=True)
    check_tensor(f"{name}: boxes", boxes, (len(table), "Q", 4), device)


# `shapes` holds H and W of each level: [H_0, W_0, H_1, W_1, ...].
@torch.library.custom_op("dynamic_detr::pyramid_roi_align", mutates_args=())
def _forward(
    table: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: list[int],
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    regions = (boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size)
    if kernel_serves(table):
        from .kernels import roi_align

        area = plain.finest_area(strides, canonical_size)
        return roi_align.forward(table, *regions[:-1], area)
    return plain.forward(table, *regions)


@_forward.register_fake
def _(table, boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size):
    return table.new_empty(*boxes.shape[:2], output_size**2, table.shape[-1])


# The gradient does not depend on the features, so they are not saved.
@torch.library.custom_op("dynamic_detr::pyramid_roi_align_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: list[int],
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> Tensor:
    regions = (boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size)
    if kernel_serves(grad_out) and not torch.are_deterministic_algorithms_enabled():
        from .kernels import roi_align

        area = plain.finest_area(strides, canonical_size)
        return roi_align.backward(grad_out, *regions[:-1], area)
    return plain.backward(grad_out, *regions)


@_backward.register_fake
def _(grad_out, boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size):
    return grad_out.new_empty(boxes.shape[0], rows_of(shapes), grad_out.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    _, boxes, image_sizes, *ctx.geometry = inputs
    ctx.save_for_backward(boxes, image_sizes)


def _differentiate(ctx, grad_out: Tensor):
    grad_table = _backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
    return grad_table, None, None, *(None for _ in ctx.geometry)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
