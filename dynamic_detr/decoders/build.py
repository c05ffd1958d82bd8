"""The registry of decoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["DECODER_REGISTRY", "build_decoder"]

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders: `forward(pyramid) -> list[Prediction]`, one per stage, the last one final. Each is made
from the whole config.
"""


def build_decoder(cfg: CfgNode) -> nn.Module:
    """The decoder that `MODEL.SET_DETECTOR.DECODER` names."""
    return DECODER_REGISTRY.get(cfg.MODEL.SET_DETECTOR.DECODER)(cfg)
