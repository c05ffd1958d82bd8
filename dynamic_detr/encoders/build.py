"""The registry of encoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["ENCODER_REGISTRY", "build_encoder"]

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Encoders: `forward(pyramid) -> pyramid` of the same shape. Each is made from the whole config.
"""


def build_encoder(cfg: CfgNode) -> nn.Module:
    """The encoder that `MODEL.SET_DETECTOR.ENCODER` names."""
    return ENCODER_REGISTRY.get(cfg.MODEL.SET_DETECTOR.ENCODER)(cfg)
