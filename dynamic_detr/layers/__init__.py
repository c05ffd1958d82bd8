"""Learnable blocks that more than one room uses."""

from .attention import Attention, check_heads, padding_mask
from .box_head import MLP, inverse_sigmoid
from .class_head import ClassHead, class_scores
from .deformable_attention import DeformableAttention
from .dyrelu import DyReLU, hard_sigmoid, linear
from .feed_forward import FeedForward
from .group_norm import group_norm_affine
from .positions import sine_embedding, sine_positions

__all__ = [
    "MLP",
    "Attention",
    "ClassHead",
    "DeformableAttention",
    "DyReLU",
    "FeedForward",
    "check_heads",
    "class_scores",
    "group_norm_affine",
    "hard_sigmoid",
    "inverse_sigmoid",
    "linear",
    "padding_mask",
    "sine_embedding",
    "sine_positions",
]
