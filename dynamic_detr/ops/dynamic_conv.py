"""Dynamic convolution (equation 11): every query filters its own region with its own 1×1
convolution."""

import torch
from torch import Tensor

__all__ = ["dynamic_conv"]


def dynamic_conv(features: Tensor, filters: Tensor) -> Tensor:
    """Applies one 1×1 convolution to each region.

    Args:
        features: (..., P, C_in), P positions of each region.
        filters: (..., C_in, C_out), the filter of each region.

    Returns:
        (..., P, C_out).

    Raises:
        ValueError: features and filters do not fit together.
    """
    if features.shape[:-2] != filters.shape[:-2] or features.shape[-1] != filters.shape[-2]:
        raise ValueError(
            f"dynamic_conv: features {tuple(features.shape)} and filters {tuple(filters.shape)} "
            "must be (..., P, C_in) and (..., C_in, C_out)."
        )
    return torch.matmul(features, filters)
