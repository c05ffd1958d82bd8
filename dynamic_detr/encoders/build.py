"""Registry of encoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["ENCODER_REGISTRY", "build_encoder"]

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Encoders: `forward(pyramid) -> pyramid` of the same shape. The registered object is called as
`obj(cfg)`.
"""


def build_encoder(cfg: CfgNode) -> nn.Module:
    """Build the encoder named by `MODEL.SET_DETECTOR.ENCODER`."""
    return ENCODER_REGISTRY.get(cfg.MODEL.SET_DETECTOR.ENCODER)(cfg)
