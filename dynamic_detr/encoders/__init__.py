"""Encoders: one file each, Pyramid in, Pyramid out."""

from .build import ENCODER_REGISTRY, build_encoder
from .deformable import DeformableEncoder
from .dynamic import DynamicEncoder
from .identity import IdentityEncoder
from .transformer import TransformerEncoder

__all__ = [
    "ENCODER_REGISTRY",
    "DeformableEncoder",
    "DynamicEncoder",
    "IdentityEncoder",
    "TransformerEncoder",
    "build_encoder",
]
