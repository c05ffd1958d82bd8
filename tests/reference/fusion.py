"""Reference of `fuse_levels`: separate operations on single images, cropped to their true sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamic_detr.ops import FusionWeights


def fuse_levels(
    same: list[Tensor],
    finer: list[Tensor],
    coarser: list[Tensor],
    sizes: list[Tensor],
    weights: FusionWeights,
    num_groups: int,
    eps: float,
) -> list[Tensor]:
    levels = []
    for i, features in enumerate(same):
        images = []
        for image, (h, w) in enumerate(sizes[i].tolist()):
            maps = [(0, features[image, :, :h, :w])]
            if i > 0:
                maps.append((1, finer[i - 1][image, :, :h, :w]))
            if i + 1 < len(same):
                maps.append((2, coarser[i][image, :, : (h + 1) // 2, : (w + 1) // 2]))
            normed = [_norm(m, k, weights, num_groups, eps)[..., :h, :w] for k, m in maps]
            level = sum(_scale(m, weights) * m for m in normed) / len(normed)
            height, width = features.shape[2:]
            images.append(F.pad(_activate(level, weights), (0, width - w, 0, height - h)))
        levels.append(torch.cat(images))
    return levels


def _norm(features: Tensor, k: int, weights: FusionWeights, groups: int, eps: float) -> Tensor:
    """Normalise map k (C, h, w), upsampled if coarser: (1, C, h, w), perhaps one pixel larger."""
    bias, weight, shift = (p[k] for p in weights[:3])
    normed = F.group_norm((features + bias[:, None, None])[None], groups, weight, shift, eps)
    if k == 2:
        normed = F.interpolate(normed, scale_factor=2, mode="bilinear", align_corners=False)
    return normed


def _scale(features: Tensor, weights: FusionWeights) -> Tensor | float:
    if weights.scale_weight is None:
        return 1.0
    score = F.linear(features.mean(dim=(2, 3)), weights.scale_weight, weights.scale_bias).relu()
    return (F.relu6(score + 3) / 6)[:, :, None, None]


def _activate(features: Tensor, weights: FusionWeights) -> Tensor:
    if weights.reduce_weight is None:
        return features.relu()
    pooled = features.mean(dim=(2, 3))
    hidden = F.linear(pooled, weights.reduce_weight, weights.reduce_bias).relu()
    y = F.relu6(F.linear(hidden, weights.expand_weight, weights.expand_bias) + 3) / 6 - 0.5
    a1, b1, a2, b2 = y[:, :, None, None].chunk(4, dim=1)
    return torch.maximum((2 * a1 + 1) * features + b1, 2 * a2 * features + b2)
