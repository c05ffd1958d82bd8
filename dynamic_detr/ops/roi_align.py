"""RoIAlign over a whole pyramid (equation 8): every box is pooled from the level that suits its
size, all boxes of all images in one operator.

Unlike torchvision's operator it clamps at the true edge of each image's level, not at the edge
of the padded batch, so that what a box pools does not depend on the padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import kernel_serves
from .check import check_at_least, check_spatial_shapes, check_tensor
from .plain import roi_align as plain

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
    """Pools a square grid of features from each box.

    Each bin is the mean of sampling_ratio² bilinear samples, on the box shifted by half a pixel
    (`aligned=True`). Samples up to one pixel outside the true level are moved to its edge, those
    further out, or nowhere, are zero. Boxes get no gradient.

    On a GPU the gradient of the features is added up in an order that changes from run to run,
    unless `torch.use_deterministic_algorithms` is on, which costs the kernel's speed. There are
    no gradients of gradients.

    Args:
        table: (B, ΣHW, C), the levels one after the other, each row by row (`Pyramid.table`).
        spatial_shapes: (H, W) of each of the L levels.
        strides: strides of the levels in pixels of the image, each twice the one before.
        image_sizes: (B, 2) integers, true (height, width) of each image in pixels.
        boxes: (B, Q, 4) corners in pixels of the unpadded image.
        output_size: R, bins on each side.
        sampling_ratio: samples on each side of a bin.
        canonical_size: see `assign_levels`.

    Returns:
        (B, Q, R·R, C), bins row by row, in the dtype of the table, also under autocast.
        Positions and weights are computed in float32 whatever the features are.

    Raises:
        ValueError: an argument does not fit; the line names it.
    """
    _check(table, spatial_shapes, strides, image_sizes, boxes)
    check_at_least("pyramid_roi_align", 1, output_size=output_size, sampling_ratio=sampling_ratio)
    if not canonical_size > 0:
        raise ValueError(
            f"pyramid_roi_align: canonical_size is {canonical_size!r}; wants a number above 0."
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
            f"{name}: strides is {tuple(strides)}; wants one for each of the "
            f"{len(spatial_shapes)} levels of spatial_shapes."
        )
    positions = sum(height * width for height, width in spatial_shapes)
    check_tensor(f"{name}: table", table, ("B", positions, "C"))
    check_tensor(f"{name}: image_sizes", image_sizes, (len(table), 2), device, integer=True)
    check_tensor(f"{name}: boxes", boxes, (len(table), "Q", 4), device)


# `shapes` are the levels' (H, W), one after the other.
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


# The gradient does not depend on the features, so that they are not kept for it.
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
    return grad_out.new_empty(boxes.shape[0], plain.rows_of(shapes), grad_out.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    _, boxes, image_sizes, *ctx.geometry = inputs
    ctx.save_for_backward(boxes, image_sizes)


def _differentiate(ctx, grad_out: Tensor):
    grad_table = _backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
    return grad_table, None, None, *(None for _ in ctx.geometry)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
