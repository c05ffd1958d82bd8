"""DETR: weights of its released code and of Hugging Face's `DetrForObjectDetection`."""

from torch import Tensor

from . import rename
from .huggingface import join_projections
from .resnet import resnet_rules

__all__ = ["convert", "convert_huggingface"]

LAYER = r"((?:en|de)coder\.layers\.\d+\.)"

PUBLISHED = [
    (rf"transformer\.{LAYER}self_attn\.(.+)", r"\1self_attention.attention.\2"),
    (rf"transformer\.{LAYER}multihead_attn\.(.+)", r"\1cross_attention.attention.\2"),
    (rf"transformer\.{LAYER}linear(\d\..+)", r"\1ffn.linear\2"),
    (rf"transformer\.{LAYER}norm1\.(.+)", r"\1self_attention.norm.\2"),
    (r"transformer\.(encoder\.layers\.\d+\.)norm2\.(.+)", r"\1ffn.norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+\.)norm2\.(.+)", r"\1cross_attention.norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+\.)norm3\.(.+)", r"\1ffn.norm.\2"),
    (r"transformer\.decoder\.norm\.(.+)", r"decoder.norm.\1"),
    (r"query_embed\.weight", r"decoder.query_embed.weight"),
    (r"class_embed\.(.+)", r"decoder.class_logits.\1"),
    (r"bbox_embed\.(.+)", r"decoder.box_head.\1"),
    (r"input_proj\.(.+)", r"backbone.projections.p5.\1"),
    *resnet_rules(r"backbone\.0\.body\."),
]

# Older releases have the names conv_encoder, out_proj and fc1; newer ones have o_proj and mlp.fc1.
HUGGING_FACE = [
    (rf"model\.{LAYER}self_attn\.(?:o|out)_proj\.(.+)", r"\1self_attention.attention.out_proj.\2"),
    (
        rf"model\.{LAYER}encoder_attn\.(?:o|out)_proj\.(.+)",
        r"\1cross_attention.attention.out_proj.\2",
    ),
    (rf"model\.{LAYER}self_attn\.in_proj\.(.+)", r"\1self_attention.attention.in_proj_\2"),
    (rf"model\.{LAYER}encoder_attn\.in_proj\.(.+)", r"\1cross_attention.attention.in_proj_\2"),
    (rf"model\.{LAYER}(?:mlp\.)?fc(\d\..+)", r"\1ffn.linear\2"),
    (rf"model\.{LAYER}self_attn_layer_norm\.(.+)", r"\1self_attention.norm.\2"),
    (rf"model\.{LAYER}encoder_attn_layer_norm\.(.+)", r"\1cross_attention.norm.\2"),
    (rf"model\.{LAYER}final_layer_norm\.(.+)", r"\1ffn.norm.\2"),
    (r"model\.decoder\.layernorm\.(.+)", r"decoder.norm.\1"),
    (r"model\.query_position_embeddings\.weight", r"decoder.query_embed.weight"),
    (r"class_labels_classifier\.(.+)", r"decoder.class_logits.\1"),
    (r"bbox_predictor\.(.+)", r"decoder.box_head.\1"),
    (r"model\.input_projection\.(.+)", r"backbone.projections.p5.\1"),
    *resnet_rules(r"model\.backbone\.(?:conv_encoder\.)?model\."),
]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the released code."""
    return rename(weights, PUBLISHED)


def convert_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of Hugging Face's class."""
    return rename(join_projections(weights), HUGGING_FACE)
