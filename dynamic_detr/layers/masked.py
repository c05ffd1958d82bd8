"""Statistics and borders that stop at the true edge of each image.

A batch pads its images to a common size. Means, norms and upsampling that looked at the padding
would make what is said of an image depend on its neighbours in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..structures import Pyramid

__all__ = ["MaskedGroupNorm", "masked_mean", "replicate_edge", "upsample_twice"]


def masked_mean(features: Tensor, pyramid: Pyramid, level: int) -> Tensor:
    """Mean over the true pixels of a level.

    Args:
        features: (B, C, H, W), of the spatial size of the level.
        pyramid: says which pixels are true.
        level: index of the level.

    Returns:
        (B, C) float32 (float64 for float64 features).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if pyramid.filled(level):
        return features.mean(dim=(2, 3))
    valid = pyramid.valid(level)
    return (features * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3)).to(features.dtype)


def replicate_edge(features: Tensor, pyramid: Pyramid, level: int) -> Tensor:
    """Continues the last true row and column of each image over its padding.

    Args:
        features: (B, C, H, W), of the spatial size of the level.

    Returns:
        The same shape; true pixels are unchanged.
    """
    if pyramid.filled(level):
        return features
    batch, _, height, width = features.shape
    device = features.device
    sizes = pyramid.sizes(level)
    rows = torch.minimum(torch.arange(height, device=device), sizes[:, :1] - 1)  # (B, H)
    columns = torch.minimum(torch.arange(width, device=device), sizes[:, 1:] - 1)  # (B, W)
    images = torch.arange(batch, device=device)[:, None, None]
    pixels = features.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics count the true pixels only.

    Args:
        num_groups: groups of channels.
        num_channels: C.
        eps: added to the variance.
    """

    def forward(self, features: Tensor, pyramid: Pyramid, level: int) -> Tensor:
        """Normalises (B, C, H, W) features of the given level; statistics are float32."""
        if pyramid.filled(level):
            return super().forward(features)
        dtype = torch.promote_types(features.dtype, torch.float32)
        valid = pyramid.valid(level)[:, :, None].to(dtype)  # (B, 1, 1, H, W)
        grouped = features.to(dtype).unflatten(1, (self.num_groups, -1))  # (B, G, C/G, H, W)
        count = valid.sum(dim=(2, 3, 4), keepdim=True) * grouped.shape[2]
        mean = (grouped * valid).sum(dim=(2, 3, 4), keepdim=True) / count
        centered = grouped - mean
        variance = (centered.square() * valid).sum(dim=(2, 3, 4), keepdim=True) / count
        out = (centered * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        if self.affine:
            out = out * self.weight.to(dtype)[:, None, None] + self.bias.to(dtype)[:, None, None]
        return out.to(features.dtype)


def upsample_twice(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear ×2 (align_corners=False), cropped to a size of at most twice the input's."""
    up = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    return up[..., : size[0], : size[1]]
