"""Operators: functions without learnable parameters, the same on every device.

A file here defines the public function: it checks the arguments, registers the operator and its
gradient, and dispatches to the file of the same name in `plain` (PyTorch) or `kernels` (Triton).
"""

from .deform_conv import deform_conv2d
from .fuse_levels import FusionWeights, fuse_levels
from .ms_deform_attn import ms_deform_attn
from .plain.roi_align import assign_levels
from .roi_align import pyramid_roi_align

__all__ = [
    "FusionWeights",
    "assign_levels",
    "deform_conv2d",
    "fuse_levels",
    "ms_deform_attn",
    "pyramid_roi_align",
]
