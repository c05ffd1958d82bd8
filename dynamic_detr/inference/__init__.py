"""A trained detector in use: pictures in, detections out."""

from .detections import Detection, Detections
from .detector import Detector, load

__all__ = ["Detection", "Detections", "Detector", "load"]
