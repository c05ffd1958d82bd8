"""RoIAlign over a whole pyramid (equation 8): every box is pooled from the level that suits its
size, all boxes of all images in one gather.

Unlike torchvision's operator it clamps at the true edge of each image's level, not at the edge
of the padded batch, so that what a box pools does not depend on the padding.
"""

import torch
from torch import Tensor

from ..structures import Pyramid
from .gather import bilinear_corners, weighted_gather

__all__ = ["assign_levels", "pyramid_roi_align"]

CANONICAL_SIZE = 224  # pixels; a box of this size is pooled from the canonical stride
CANONICAL_STRIDE = 16


def assign_levels(
    boxes: Tensor, strides: tuple[int, ...], canonical_size: float = CANONICAL_SIZE
) -> Tensor:
    """The level each box is pooled from (Feature Pyramid Networks, equation 1).

    Args:
        boxes: (..., 4) corners in pixels of the image.
        strides: strides of the levels, each twice the one before.
        canonical_size: the square root of area that is pooled from stride 16.

    Returns:
        (...) int64 in [0, L). Boxes without area, inverted or not finite go to the finest level.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    sizes = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    scale = sizes.prod(dim=-1).sqrt() / canonical_size * (CANONICAL_STRIDE / strides[0])
    level = torch.floor(torch.log2(scale + 1e-8))
    level = torch.nan_to_num(level, nan=0.0, posinf=0.0, neginf=0.0)
    return level.clamp(0, len(strides) - 1).long()


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
    further out are zero, as in the usual operator. Boxes get no gradient.

    Args:
        pyramid: levels of C channels.
        boxes: (B, Q, 4) corners in pixels of the unpadded image.
        output_size: R, bins on each side.
        sampling_ratio: samples on each side of a bin.
        canonical_size: see `assign_levels`.

    Returns:
        (B, Q, R·R, C), bins row by row, in the dtype of the features.

    Raises:
        ValueError: boxes are not (B, Q, 4).
    """
    batch = pyramid.image_sizes.shape[0]
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[-1] != 4:
        raise ValueError(
            f"pyramid_roi_align: boxes has shape {tuple(boxes.shape)}; wants ({batch}, Q, 4)."
        )
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    device = boxes.device
    level = assign_levels(boxes, pyramid.strides, canonical_size)  # (B, Q)
    strides = torch.tensor(pyramid.strides, device=device)
    shapes = torch.tensor([f.shape[-2:] for f in pyramid.features], device=device)
    first_row = torch.cumsum(shapes.prod(dim=1), dim=0)
    rows_per_image = first_row[-1]
    first_row = first_row - shapes.prod(dim=1)
    first_row = first_row[level] + torch.arange(batch, device=device)[:, None] * rows_per_image
    stride = strides[level][..., None]
    # true height and width of the level of each box: (B, Q, 2)
    size = (pyramid.image_sizes[:, None] + stride - 1).div(stride, rounding_mode="floor")

    corners = boxes / stride - 0.5
    samples = output_size * sampling_ratio
    steps = (torch.arange(samples, device=device, dtype=boxes.dtype) + 0.5) / samples
    extent = corners[..., 2:] - corners[..., :2]
    x = corners[..., 0, None] + extent[..., 0, None] * steps  # (B, Q, samples)
    y = corners[..., 1, None] + extent[..., 1, None] * steps
    height, width = size[..., 0, None], size[..., 1, None]
    inside_y, inside_x = (y >= -1) & (y <= height), (x >= -1) & (x <= width)
    y = torch.minimum(y.clamp(min=0), (height - 1).to(y.dtype))
    x = torch.minimum(x.clamp(min=0), (width - 1).to(x.dtype))

    index, weight = bilinear_corners(
        y[..., :, None],
        x[..., None, :],
        height[..., None],
        width[..., None],
        shapes[:, 1][level][..., None, None],
    )  # (B, Q, samples, samples, 4)
    weight = weight * (inside_y[..., :, None] & inside_x[..., None, :])[..., None]
    index = index + first_row[..., None, None, None]

    def by_bin(values: Tensor) -> Tensor:
        grid = (output_size, sampling_ratio)
        values = values.unflatten(2, grid).unflatten(4, grid)  # (B, Q, R, s, R, s, 4)
        return values.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(0, 3)

    pooled = weighted_gather(
        pyramid.table().flatten(0, 1), by_bin(index), by_bin(weight / sampling_ratio**2)
    )
    return pooled.view(*boxes.shape[:2], output_size**2, pyramid.channels)
