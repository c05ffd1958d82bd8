"""Encoders: one file each, Pyramid in, Pyramid out.

Names that ``MODEL.BACKBONE.NAME`` may give, for an encoder within a Detectron2 backbone:
``build_resnet_fpn_dyhead_backbone`` and ``build_retinanet_resnet_fpn_dyhead_backbone``.
"""

from .backbone import EncodedFPN
from .build import ENCODER_REGISTRY, build_encoder
from .deformable import DeformableEncoder
from .dynamic import DynamicEncoder
from .identity import IdentityEncoder
from .smca import SMCAEncoder
from .transformer import TransformerEncoder

__all__ = [
    "ENCODER_REGISTRY",
    "DeformableEncoder",
    "DynamicEncoder",
    "EncodedFPN",
    "IdentityEncoder",
    "SMCAEncoder",
    "TransformerEncoder",
    "build_encoder",
]
