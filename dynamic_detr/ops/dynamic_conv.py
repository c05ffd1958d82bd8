"""Dynamic convolution (equation 11): the features of each query pass through a 1×1 convolution that
the query generates."""

import torch
from torch import Tensor

__all__ = ["dynamic_conv"]


def dynamic_conv(features: Tensor, filters: Tensor) -> Tensor:
    """Apply a separate 1×1 convolution to each region.

    Args:
        features: (..., P, C_in), P positions of each region.
        filters: (..., C_in, C_out), the filter of each region.

    Returns:
        (..., P, C_out).

    Raises:
        ValueError: if the shapes do not match.
    """
    if features.shape[:-2] != filters.shape[:-2] or features.shape[-1] != filters.shape[-2]:
        raise ValueError(
            "dynamic_conv: expected features (..., P, C_in) and filters (..., C_in, C_out), "
            f"got {tuple(features.shape)} and {tuple(filters.shape)}"
        )
    return torch.matmul(features, filters)
