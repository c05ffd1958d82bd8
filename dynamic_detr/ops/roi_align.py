"""RoIAlign over a whole pyramid (equation 8): every box is pooled from the level that suits its
size, all boxes of all images in one operator.

Unlike torchvision's operator it clamps at the true edge of each image's level, not at the edge
of the padded batch, so that what a box pools does not depend on the padding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..structures import Pyramid
from .backend import kernel_serves
from .plain.bilinear import BilinearSamples
from .plain.gather import add_table_gradient, weighted_gather

__all__ = ["assign_levels", "pyramid_roi_align"]

CANONICAL_SIZE = 224  # pixels; a box of this size is pooled from the canonical stride
CANONICAL_STRIDE = 16


def assign_levels(
    boxes: Tensor, strides: Sequence[int], canonical_size: float = CANONICAL_SIZE
) -> Tensor:
    """The level each box is pooled from (Feature Pyramid Networks, equation 1).

    Areas are compared with the squares of the sizes at which the level changes, which needs no
    logarithm: the same box gets the same level on every device.

    Args:
        boxes: (..., 4) corners in pixels of the image.
        strides: strides of the levels, each twice the one before.
        canonical_size: the square root of area that is pooled from stride 16.

    Returns:
        (...) int64 in [0, L). Boxes without area, inverted or not finite go to the finest level.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)
    level = torch.zeros_like(area, dtype=torch.int64)
    for step in range(1, len(strides)):
        level += area >= finest_area(strides, canonical_size) * 4**step
    return level.where(area < math.inf, 0)


def finest_area(strides: Sequence[int], canonical_size: float) -> float:
    """Area from which a box would leave a level below the finest; 4 times it for the next."""
    return (canonical_size * strides[0] / CANONICAL_STRIDE) ** 2


def pyramid_roi_align(
    pyramid: Pyramid,
    boxes: Tensor,
    output_size: int = 7,
    sampling_ratio: int = 2,
    canonical_size: float = CANONICAL_SIZE,
) -> Tensor:
    """Pools a square grid of features from each box.

    Each bin is the mean of sampling_ratio² bilinear samples, on the box shifted by half a pixel
    (`aligned=True`). Samples up to one pixel outside the true level are moved to its edge, those
    further out, or nowhere, are zero. Boxes get no gradient.

    On a GPU the gradient of the features is added up in an order that changes from run to run,
    unless `torch.use_deterministic_algorithms` is on, which costs the kernel's speed. There are
    no gradients of gradients.

    Args:
        pyramid: levels of C channels.
        boxes: (B, Q, 4) corners in pixels of the unpadded image.
        output_size: R, bins on each side.
        sampling_ratio: samples on each side of a bin.
        canonical_size: see `assign_levels`.

    Returns:
        (B, Q, R·R, C), bins row by row, in the dtype of the features, also under autocast.
        Positions and weights are computed in float32 whatever the features are.

    Raises:
        ValueError: an argument does not fit; the line names it.
    """
    _check(pyramid, boxes, output_size, sampling_ratio, canonical_size)
    with torch.autocast(boxes.device.type, enabled=False):
        return _forward(
            pyramid.table(),
            boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)),
            pyramid.image_sizes,
            [side for feature in pyramid.features for side in feature.shape[-2:]],
            list(pyramid.strides),
            output_size,
            sampling_ratio,
            float(canonical_size),
        )


def _check(pyramid, boxes, output_size, sampling_ratio, canonical_size) -> None:
    batch = pyramid.image_sizes.shape[0]
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[-1] != 4:
        raise ValueError(
            f"pyramid_roi_align: boxes has shape {tuple(boxes.shape)}; wants ({batch}, Q, 4)."
        )
    device = pyramid.features[0].device
    tensors = {f"pyramid.features[{i}]": feature for i, feature in enumerate(pyramid.features)}
    tensors |= {"pyramid.image_sizes": pyramid.image_sizes, "boxes": boxes}
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(
                f"pyramid_roi_align: {name} is on {tensor.device}; wants {device}, "
                "as pyramid.features[0]."
            )
        if not tensor.is_floating_point() and tensor is not pyramid.image_sizes:
            raise ValueError(
                f"pyramid_roi_align: {name} is {tensor.dtype}; wants a floating dtype."
            )
    for name, number in (("output_size", output_size), ("sampling_ratio", sampling_ratio)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"pyramid_roi_align: {name} is {number!r}; wants an integer >= 1.")
    if not canonical_size > 0:
        raise ValueError(
            f"pyramid_roi_align: canonical_size is {canonical_size!r}; wants a number above 0."
        )


# The operator takes all levels as one table: it is built once and shared by all decoder stages.
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

        area = finest_area(strides, canonical_size)
        return roi_align.forward(table, *regions[:-1], area)
    index, weight = _samples(*regions)
    pooled = weighted_gather(table.detach().flatten(0, 1), index, weight)
    return pooled.view(*boxes.shape[:2], output_size**2, table.shape[-1])


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

        area = finest_area(strides, canonical_size)
        return roi_align.backward(grad_out, *regions[:-1], area)
    shape = (boxes.shape[0], _rows(shapes), grad_out.shape[-1])
    if grad_out.numel() == 0:
        return grad_out.new_zeros(shape)
    index, weight = _samples(*regions)
    grad_table = grad_out.new_zeros(shape, dtype=torch.promote_types(grad_out.dtype, torch.float32))
    add_table_gradient(grad_table.flatten(0, 1), grad_out.flatten(0, 2), index, weight)
    return grad_table.to(grad_out.dtype)


@_backward.register_fake
def _(grad_out, boxes, image_sizes, shapes, strides, output_size, sampling_ratio, canonical_size):
    return grad_out.new_empty(boxes.shape[0], _rows(shapes), grad_out.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    _, boxes, image_sizes, *ctx.geometry = inputs
    ctx.save_for_backward(boxes, image_sizes)


def _differentiate(ctx, grad_out: Tensor):
    grad_table = _backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
    return grad_table, None, None, *(None for _ in ctx.geometry)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _rows(shapes: Sequence[int]) -> int:
    return sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))


def _samples(
    boxes: Tensor,
    image_sizes: Tensor,
    shapes: Sequence[int],
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    canonical_size: float,
) -> tuple[Tensor, Tensor]:
    """Rows of the flattened table and their weights, of each bin: (B·Q·R², sampling_ratio²·4)."""
    level = assign_levels(boxes, strides, canonical_size)  # (B, Q)
    first_rows = [_rows(shapes[: 2 * i]) for i in range(len(strides))]
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    first_row = _of_level(level, first_rows) + image * _rows(shapes)
    stride = _of_level(level, strides)[..., None]
    # true height and width of the level of each box, never beyond its features: (B, Q, 2)
    size = (image_sizes[:, None] + stride - 1).div(stride, rounding_mode="floor")
    level_width = _of_level(level, shapes[1::2])
    level_size = torch.stack([_of_level(level, shapes[::2]), level_width], dim=-1)
    size = torch.minimum(size, level_size)

    corners = boxes / stride - 0.5
    samples = output_size * sampling_ratio
    steps = (torch.arange(samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / samples
    extent = corners[..., 2:] - corners[..., :2]
    x = corners[..., 0, None] + extent[..., 0, None] * steps  # (B, Q, samples)
    y = corners[..., 1, None] + extent[..., 1, None] * steps
    height, width = size[..., 0, None], size[..., 1, None]
    inside_y, inside_x = (y >= -1) & (y <= height), (x >= -1) & (x <= width)
    y = torch.minimum(y.clamp(min=0), (height - 1).to(y.dtype))
    x = torch.minimum(x.clamp(min=0), (width - 1).to(x.dtype))

    bilinear = BilinearSamples(
        y[..., :, None], x[..., None, :], height[..., None], width[..., None]
    )  # (B, Q, samples, samples)
    inside = (inside_y[..., :, None] & inside_x[..., None, :])[..., None]
    weight = bilinear.weight().where(inside, 0) / sampling_ratio**2
    index = bilinear.index(level_width[..., None, None]) + first_row[..., None, None, None]

    def by_bin(values: Tensor) -> Tensor:
        grid = (output_size, sampling_ratio)
        values = values.unflatten(2, grid).unflatten(4, grid)  # (B, Q, R, s, R, s, 4)
        return values.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(0, 3)

    return by_bin(index), by_bin(weight)


def _of_level(level: Tensor, numbers: Sequence[int]) -> Tensor:
    """The number of each level; they are not copied to the device, which would stall it."""
    chosen = torch.full_like(level, numbers[0])
    for other, number in enumerate(numbers[1:], start=1):
        chosen = chosen.where(level != other, number)
    return chosen
