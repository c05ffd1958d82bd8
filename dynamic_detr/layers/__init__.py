"""Learnable blocks that more than one room uses."""

from .dyrelu import DyReLU, hard_sigmoid, linear
from .group_norm import group_norm_affine

__all__ = ["DyReLU", "group_norm_affine", "hard_sigmoid", "linear"]
