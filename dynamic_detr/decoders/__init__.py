"""Decoders: modules from a Pyramid to one Prediction per stage, one file each."""

from .build import DECODER_REGISTRY, build_decoder
from .deformable import DeformableDecoder
from .dynamic import DynamicDecoder
from .smca import SMCADecoder
from .transformer import TransformerDecoder

__all__ = [
    "DECODER_REGISTRY",
    "DeformableDecoder",
    "DynamicDecoder",
    "SMCADecoder",
    "TransformerDecoder",
    "build_decoder",
]
