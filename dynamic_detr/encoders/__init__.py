"""Encoders: one file each, Pyramid in, Pyramid out."""

from .build import ENCODER_REGISTRY, build_encoder
from .dynamic import DynamicEncoder
from .identity import IdentityEncoder
from .transformer import TransformerEncoder

__all__ = [
    "ENCODER_REGISTRY",
    "DynamicEncoder",
    "IdentityEncoder",
    "TransformerEncoder",
    "build_encoder",
]
