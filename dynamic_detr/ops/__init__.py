"""Operators: one public function each, with one meaning on every device. `backend` says where a
Triton kernel of `kernels` serves; everywhere else it is PyTorch on `weighted_gather`."""

from .blend_dyrelu import blend_dyrelu
from .deform_conv import deform_conv2d
from .dynamic_conv import dynamic_conv
from .masked_moments import MeasuredMaps, masked_moments
from .ms_deform_attn import ms_deform_attn
from .plain.gather import weighted_gather
from .roi_align import assign_levels, pyramid_roi_align

__all__ = [
    "MeasuredMaps",
    "assign_levels",
    "blend_dyrelu",
    "deform_conv2d",
    "dynamic_conv",
    "masked_moments",
    "ms_deform_attn",
    "pyramid_roi_align",
    "weighted_gather",
]
