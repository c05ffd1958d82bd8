"""Registry of decoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["DECODER_REGISTRY", "build_decoder"]

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders: `forward(pyramid) -> list[Prediction]`, one per stage, the last one final. The registered
object is called as `obj(cfg)`.
"""


def build_decoder(cfg: CfgNode) -> nn.Module:
    """Build the decoder named by `MODEL.SET_DETECTOR.DECODER`."""
    return DECODER_REGISTRY.get(cfg.MODEL.SET_DETECTOR.DECODER)(cfg)
