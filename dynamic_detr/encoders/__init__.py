"""Encoders: one file each, Pyramid in, Pyramid out."""

from .build import ENCODER_REGISTRY, build_encoder
from .dynamic import DynamicEncoder
from .identity import IdentityEncoder
from .smca import SMCAEncoder

__all__ = ["ENCODER_REGISTRY", "DynamicEncoder", "IdentityEncoder", "SMCAEncoder", "build_encoder"]
