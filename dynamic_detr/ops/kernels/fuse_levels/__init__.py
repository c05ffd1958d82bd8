"""Triton kernels of `fuse_levels`: moments of the maps of a level, fusion, and both gradients. All
are bound by memory bandwidth."""

from .fuse import coefficient_gradients, fuse
from .map_gradients import map_gradients
from .moments import moments

__all__ = ["coefficient_gradients", "fuse", "map_gradients", "moments"]
