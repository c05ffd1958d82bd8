"""Reference of bilinear sampling and of the operators built on it: deformable convolution, RoIAlign
and multi-scale deformable attention."""

import math

import numpy as np


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Sample (C, H, W) at one position, with zeros outside the map."""
    _, height, width = image.shape
    value = np.zeros(image.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return value


def deform_conv(
    image: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> np.ndarray:
    """Return y(p) = Σ_k w_k · x(p + p_k + Δp_k) · Δm_k (Deformable ConvNets v2, equation 1).

    Args:
        image: (C, H, W).
        offset: (2·taps, Ho, Wo), y, x of each tap.
        mask: (taps, Ho, Wo).
    """
    out_channels, group_channels, kh, kw = weight.shape
    _, out_height, out_width = offset.shape
    out = np.zeros((out_channels, out_height, out_width))
    outputs_per_group = out_channels // groups
    for row in range(out_height):
        for column in range(out_width):
            for tap_row in range(kh):
                for tap_column in range(kw):
                    tap = tap_row * kw + tap_column
                    sample = bilinear(
                        image,
                        row * stride - padding + tap_row * dilation + offset[2 * tap, row, column],
                        column * stride
                        - padding
                        + tap_column * dilation
                        + offset[2 * tap + 1, row, column],
                    )
                    if mask is not None:
                        sample = sample * mask[tap, row, column]
                    for group in range(groups):
                        inputs = slice(group * group_channels, (group + 1) * group_channels)
                        outputs = slice(group * outputs_per_group, (group + 1) * outputs_per_group)
                        kernel = weight[outputs, :, tap_row, tap_column]
                        out[outputs, row, column] += kernel @ sample[inputs]
    return out if bias is None else out + bias[:, None, None]


def roi_level(box: np.ndarray, strides: list[int], canonical_size: float = 224) -> int:
    """Return the level ⌊4 + log2(√(wh) / 224)⌋ (Feature Pyramid Networks, equation 1), clamped."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return 0
    k = math.floor(4 + math.log2(math.sqrt(width * height) / canonical_size + 1e-8))
    first = round(math.log2(strides[0]))
    return min(max(k - first, 0), len(strides) - 1)


def roi_align(
    levels: list[np.ndarray],
    strides: list[int],
    box: np.ndarray,
    bins: int = 7,
    sampling_ratio: int = 2,
    canonical_size: float = 224,
) -> np.ndarray:
    """Pool one box (corners in pixels of the image) to (bins², C) by aligned RoIAlign (Mask R-CNN).

    Samples up to one pixel outside the map are clamped to its edge; those further out are zero.
    """
    level = roi_level(box, strides, canonical_size)
    feature = levels[level]
    channels, height, width = feature.shape
    x1, y1, x2, y2 = box / strides[level] - 0.5
    pooled = np.zeros((bins * bins, channels))
    for row in range(bins):
        for column in range(bins):
            for i in range(sampling_ratio):
                for j in range(sampling_ratio):
                    y = y1 + (y2 - y1) / bins * (row + (i + 0.5) / sampling_ratio)
                    x = x1 + (x2 - x1) / bins * (column + (j + 0.5) / sampling_ratio)
                    if -1 <= y <= height and -1 <= x <= width:
                        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                        pooled[row * bins + column] += bilinear(feature, y, x)
    return pooled / sampling_ratio**2


def ms_deform_attn(
    value: np.ndarray,
    shapes: list[tuple[int, int]],
    locations: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Return Σ_lp A_mlp · x_l(φ_l(p_mlp)) for one query of one image (Deformable DETR, equation 3).

    Args:
        value: (ΣHW, heads, d).
        locations: (heads, L, P, 2), x, y in [0, 1]; samples that are not finite are zero.
        weights: (heads, L, P).

    Returns:
        (heads · d).
    """
    _, heads, channels = value.shape
    out = np.zeros((heads, channels))
    first = 0
    for level, (height, width) in enumerate(shapes):
        rows = value[first : first + height * width]
        first += height * width
        for head in range(heads):
            image = rows[:, head].T.reshape(channels, height, width)
            for (x, y), weight in zip(locations[head, level], weights[head, level], strict=True):
                if math.isfinite(x) and math.isfinite(y):
                    sample = bilinear(image, y * height - 0.5, x * width - 0.5)
                    out[head] += weight * sample
    return out.reshape(-1)
