"""Decoders: one file each, Pyramid in, one Prediction per stage out."""

from .build import DECODER_REGISTRY, build_decoder
from .dynamic import DynamicDecoder
from .transformer import TransformerDecoder

__all__ = ["DECODER_REGISTRY", "DynamicDecoder", "TransformerDecoder", "build_decoder"]
