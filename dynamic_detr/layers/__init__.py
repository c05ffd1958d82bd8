"""Learnable blocks that more than one room uses; all of them look at true pixels only."""

from .dyrelu import DyReLU
from .masked import MaskedGroupNorm, masked_mean, replicate_edge, upsample_twice

__all__ = ["DyReLU", "MaskedGroupNorm", "masked_mean", "replicate_edge", "upsample_twice"]
