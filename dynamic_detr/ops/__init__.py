"""Operators: functions without parameters of their own, each with one meaning on every device.

A file here holds the public function, its checks, its registration and its gradient, and chooses
between the file of the same name in `plain` (PyTorch) and the one in `kernels` (Triton)."""

from .deform_conv import deform_conv2d
from .dynamic_conv import dynamic_conv
from .fuse_levels import FusionWeights, fuse_levels
from .ms_deform_attn import ms_deform_attn
from .nms import nms_mask
from .plain.roi_align import assign_levels
from .roi_align import pyramid_roi_align

__all__ = [
    "FusionWeights",
    "assign_levels",
    "deform_conv2d",
    "dynamic_conv",
    "fuse_levels",
    "ms_deform_attn",
    "nms_mask",
    "pyramid_roi_align",
]
