"""Registry of decoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["DECODER_REGISTRY", "build_decoder"]

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders: `forward(pyramid) -> list[Prediction]`, one per stage, the last one final. If the decoder
has the attribute `needs_true_boxes = True`, training calls `forward(pyramid, true_boxes)`;
`true_boxes` is a list with one tensor (T_b, 4) per image: cx, cy, w, h, normalised. The registered
object is called as `obj(cfg)`.
"""


def build_decoder(cfg: CfgNode) -> nn.Module:
    """Build the decoder named by `MODEL.SET_DETECTOR.DECODER`."""
    return DECODER_REGISTRY.get(cfg.MODEL.SET_DETECTOR.DECODER)(cfg)
