"""Functions without learnable state: everything here is a weighted gather from a pyramid,
multiplied by something."""

from .deform_conv import deform_conv2d
from .dynamic_conv import dynamic_conv
from .gather import weighted_gather
from .ms_deform_attn import ms_deform_attn
from .roi_align import assign_levels, pyramid_roi_align

__all__ = [
    "assign_levels",
    "deform_conv2d",
    "dynamic_conv",
    "ms_deform_attn",
    "pyramid_roi_align",
    "weighted_gather",
]
