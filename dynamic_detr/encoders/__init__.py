"""Encoders: modules from Pyramid to Pyramid, one file each.

``MODEL.BACKBONE.NAME`` selects an encoder inside a Detectron2 backbone by
``build_resnet_fpn_dyhead_backbone`` or ``build_retinanet_resnet_fpn_dyhead_backbone``.
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
