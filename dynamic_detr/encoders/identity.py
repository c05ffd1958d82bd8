"""Identity encoder, for the row "Dynamic Decoder" of Table 1."""

from detectron2.config import CfgNode, configurable
from torch import nn

from ..structures import Pyramid
from .build import ENCODER_REGISTRY

__all__ = ["IdentityEncoder"]


@ENCODER_REGISTRY.register()
class IdentityEncoder(nn.Module):
    """Encoder that only sets the padding to zero."""

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {}

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Return the pyramid with zeros in the padding."""
        return pyramid.masked()
