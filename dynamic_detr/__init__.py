"""Dynamic DETR, and the systems it stands on, as a Detectron2 project.

Importing the package registers its meta-architecture, backbones, encoders and decoders;
`add_dynamic_detr_config(cfg)` adds their configuration keys.
"""

from . import _require_detectron2  # noqa: F401, I001  (first: says what to do without Detectron2)
from . import backbones  # noqa: F401  (register)
from .config import add_dynamic_detr_config
from .decoders import DECODER_REGISTRY
from .detector import DynamicDETR, SetDetector
from .encoders import ENCODER_REGISTRY
from .inference import Detections, Detector, load
from .structures import Prediction, Pyramid
from .version import __version__

__all__ = [
    "DECODER_REGISTRY",
    "ENCODER_REGISTRY",
    "Detections",
    "Detector",
    "DynamicDETR",
    "Prediction",
    "Pyramid",
    "SetDetector",
    "__version__",
    "add_dynamic_detr_config",
    "load",
]
