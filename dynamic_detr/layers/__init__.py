"""Layers shared by several encoders and decoders."""

from .attention import Attention, padding_mask
from .box_head import MLP, inverse_sigmoid
from .checks import check_heads, check_levels
from .class_head import ClassHead, class_scores
from .deformable_attention import DeformableAttention
from .feed_forward import FeedForward
from .positions import sine_embedding, sine_positions
from .recompute import apply_layer

__all__ = [
    "MLP",
    "Attention",
    "ClassHead",
    "DeformableAttention",
    "FeedForward",
    "apply_layer",
    "check_heads",
    "check_levels",
    "class_scores",
    "inverse_sigmoid",
    "padding_mask",
    "sine_embedding",
    "sine_positions",
]
