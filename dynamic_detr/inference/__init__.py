"""Inference with a trained detector on images, videos and arrays."""

from .detections import Detection, Detections
from .detector import Detector, load

__all__ = ["Detection", "Detections", "Detector", "load"]
