"""Functions without learnable state: everything here is a weighted gather from a pyramid,
multiplied by something."""

from .blend_dyrelu import blend_dyrelu
from .deform_conv import deform_conv2d
from .dynamic_conv import dynamic_conv
from .gather import weighted_gather
from .masked_moments import MeasuredMaps, masked_moments
from .roi_align import assign_levels, pyramid_roi_align

__all__ = [
    "MeasuredMaps",
    "assign_levels",
    "blend_dyrelu",
    "deform_conv2d",
    "dynamic_conv",
    "masked_moments",
    "pyramid_roi_align",
    "weighted_gather",
]
