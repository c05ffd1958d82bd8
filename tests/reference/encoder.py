"""Reference of a block of the dynamic encoder (equations 4 to 7) for one unpadded image."""

import math

import numpy as np

from .sampling import bilinear, deform_conv

Weights = dict[str, np.ndarray]


def hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x + 3, 0), 6) / 6


def group_norm(image: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = np.empty_like(image)
    size = image.shape[0] // groups
    for group in range(groups):
        part = image[group * size : (group + 1) * size]
        out[group * size : (group + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return out * weight[:, None, None] + bias[:, None, None]


def convolve(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Apply a 3×3 convolution with padding 1."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((weight.shape[0], height, width))
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + height, column : column + width]
            out += np.einsum("oc,chw->ohw", weight[:, :, row, column], window)
    return out + bias[:, None, None]


def halve(predicted: np.ndarray) -> np.ndarray:
    """Return the mean of each 2×2 block; blocks at an odd edge are smaller."""
    channels, height, width = predicted.shape
    out = np.empty((channels, math.ceil(height / 2), math.ceil(width / 2)))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            block = predicted[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            out[:, row, column] = block.mean(axis=(1, 2))
    return out


def upsample_twice(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Upsample by 2: pixel i is at (i + ½)/2 - ½ of the coarser map, clamped to the map."""
    out = np.empty((image.shape[0], height, width))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) / 2 - 0.5, 0), image.shape[1] - 1)
            x = min(max((column + 0.5) / 2 - 0.5, 0), image.shape[2] - 1)
            out[:, row, column] = bilinear(image, y, x)
    return out


def dyrelu(image: np.ndarray, weights: Weights) -> np.ndarray:
    """Return max(a1·x + b1, a2·x + b2) (equation 6)."""
    channels = image.shape[0]
    pooled = image.mean(axis=(1, 2))
    hidden = np.maximum(weights["dyrelu.reduce.weight"] @ pooled + weights["dyrelu.reduce.bias"], 0)
    y = hard_sigmoid(weights["dyrelu.expand.weight"] @ hidden + weights["dyrelu.expand.bias"])
    a1, b1, a2, b2 = (y[k * channels : (k + 1) * channels, None, None] for k in range(4))
    first = (2 * (a1 - 0.5) + 1) * image + (b1 - 0.5)
    second = 2 * (a2 - 0.5) * image + (b2 - 0.5)
    return np.maximum(first, second)


def encoder_block(levels: list[np.ndarray], weights: Weights, groups: int) -> list[np.ndarray]:
    """Apply a block to levels (C, H, W), fine to coarse, each half the one before, rounded up."""

    def branch(name: str, image, offset, mask, stride: int) -> np.ndarray:
        out = deform_conv(
            image,
            offset,
            mask,
            weights[f"{name}.conv.weight"],
            weights[f"{name}.conv.bias"],
            stride=stride,
            padding=1,
        )
        return group_norm(out, groups, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])

    result = []
    for index, level in enumerate(levels):
        predicted = convolve(level, weights["offset.weight"], weights["offset.bias"])
        offset, mask = predicted[:18], 1 / (1 + np.exp(-predicted[18:]))
        maps = [branch("same", level, offset, mask, stride=1)]
        if index > 0:  # one pixel of the level is two pixels there
            maps.append(branch("finer", levels[index - 1], offset * 2, mask, stride=2))
        if index + 1 < len(levels):  # one pixel of the level is half a pixel there
            coarse = branch(
                "coarser", levels[index + 1], halve(offset * 0.5), halve(mask), stride=1
            )
            maps.append(upsample_twice(coarse, *level.shape[1:]))
        fused = np.zeros_like(level)
        for image in maps:
            score = weights["scale.weight"][0] @ image.mean(axis=(1, 2)) + weights["scale.bias"]
            fused += hard_sigmoid(np.maximum(score, 0)) * image / len(maps)
        result.append(dyrelu(fused, weights))
    return result
