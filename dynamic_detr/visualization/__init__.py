"""Visualization: image files, drawn detections, decoder stages, videos and windows."""

from .draw import draw_detections
from .images import read_image, write_image
from .sheet import contact_sheet
from .stages import draw_stages

__all__ = [
    "contact_sheet",
    "draw_detections",
    "draw_stages",
    "read_image",
    "write_image",
]
