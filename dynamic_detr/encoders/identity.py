"""No encoder: the row "Dynamic Decoder" of the paper's Table 1."""

from detectron2.config import CfgNode, configurable
from torch import nn

from ..structures import Pyramid
from .build import ENCODER_REGISTRY

__all__ = ["IdentityEncoder"]


@ENCODER_REGISTRY.register()
class IdentityEncoder(nn.Module):
    """Passes the pyramid on, with zeros beyond the true sizes as every encoder does."""

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {}

    def forward(self, pyramid: Pyramid) -> Pyramid:
        return pyramid.masked()
