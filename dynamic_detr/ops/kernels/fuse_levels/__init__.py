"""Triton kernels of `fuse_levels`: the moments of the maps, their fusion, and both gradients."""

from .blend import blend, coefficient_gradients
from .map_gradients import map_gradients
from .moments import moments

__all__ = ["blend", "coefficient_gradients", "map_gradients", "moments"]
