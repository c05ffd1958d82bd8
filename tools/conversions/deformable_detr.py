"""Deformable DETR: weights of its released code and of Hugging Face's class."""

import re

import torch
from torch import Tensor

from . import detr, rename
from .huggingface import join_projections

__all__ = ["convert", "convert_huggingface"]

ENCODER, DECODER = (rf"({part}coder\.layers\.\d+\.)" for part in ("en", "de"))

Rules = list[tuple[str, str | None]]

# Names that differ from those of DETR, whose rules follow these.
PUBLISHED = [
    (r"transformer\.level_embed", "encoder.level_embed"),
    (r"query_embed\.weight", "decoder.queries.embed.weight"),
    (rf"transformer\.{ENCODER}self_attn\.(.+)", r"\1attention.\2"),
    (rf"transformer\.{ENCODER}norm1\.(.+)", r"\1attention.norm.\2"),
    (rf"transformer\.{DECODER}cross_attn\.(.+)", r"\1cross_attention.\2"),
    (rf"transformer\.{DECODER}norm1\.(.+)", r"\1cross_attention.norm.\2"),
    (rf"transformer\.{DECODER}norm2\.(.+)", r"\1self_attention.norm.\2"),
]

HUGGING_FACE = [
    (r"model\.level_embed", "encoder.level_embed"),
    (r"model\.query_position_embeddings\.weight", "decoder.queries.embed.weight"),
    (rf"model\.{ENCODER}self_attn\.(.+)", r"\1attention.\2"),
    (rf"model\.{ENCODER}self_attn_layer_norm\.(.+)", r"\1attention.norm.\2"),
    (rf"model\.{DECODER}encoder_attn\.(.+)", r"\1cross_attention.\2"),
]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the released code, of any variant."""
    rules = [
        *PUBLISHED,
        *_level_rules(weights, ""),
        *_query_rules(r"transformer\."),
        *_head_rules(weights, r"(?:transformer\.decoder\.)?"),
        *detr.PUBLISHED,
    ]
    return rename(weights, rules)


def convert_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `DeformableDetrForObjectDetection`, of any variant and release."""
    rules = [
        *HUGGING_FACE,
        *_level_rules(weights, "model."),
        *_query_rules(r"model\."),
        *_head_rules(weights, r"(?:model\.decoder\.)?"),
        *detr.HUGGING_FACE,
    ]
    return rename(join_projections(weights), rules)


def _level_rules(weights: dict[str, Tensor], prefix: str) -> Rules:
    """Return rules for the projections: 1×1 on C3 to C5, or on C5 alone, and 3×3 for C6."""
    names = [f"{prefix}input_proj.{index}.0.weight" for index in range(len(weights))]
    kernels = [weights[name].shape[-1] for name in names if name in weights]
    first = 6 - kernels.count(1)
    rules: Rules = []
    for index, kernel in enumerate(kernels):
        group = "projections" if kernel == 1 else "extra_levels"
        new = f"backbone.{group}.p{first + index}."
        old = rf"{prefix}input_proj\.{index}\."
        rules += [(rf"{old}0\.(.+)", rf"{new}\1"), (rf"{old}1\.(.+)", rf"{new}norm.\1")]
    return rules


def _query_rules(prefix: str) -> Rules:
    """Return rules for the reference points and the proposals of two-stage variants."""
    layers = {
        "reference_points": "reference_points",
        "enc_output": "memory",
        "enc_output_norm": "memory_norm",
        "pos_trans": "box_embed",
        "pos_trans_norm": "box_embed_norm",
    }
    return [(rf"{prefix}{old}\.(.+)", rf"decoder.queries.{new}.\1") for old, new in layers.items()]


def _head_rules(weights: dict[str, Tensor], prefix: str) -> Rules:
    """Return rules for the heads, of each layer or shared by all layers.

    Args:
        weights: weights by name.
        prefix: optional prefix of the names, for the copies of the heads in refining variants.
    """
    layers = {int(name.split(".")[3]) for name in weights if ".decoder.layers." in name}
    last = [
        w
        for name, w in weights.items()
        if re.fullmatch(r"bbox_embed\.\d+\.layers\.2\.weight", name)
    ]
    refines = any(".decoder.bbox_embed." in name for name in weights) or any(
        not torch.equal(weight, last[0]) for weight in last
    )
    rules: Rules = []
    for published, new in (("class_embed", "class_head"), ("bbox_embed", "box_head")):
        old = rf"{prefix}{published}"
        proposals, head = len(layers), rf"decoder.{new}s." + (r"\1" if refines else "0")
        rules += [
            (rf"{old}\.{proposals}\.(.+)", rf"decoder.queries.{new}.\1"),
            (rf"{old}\.(\d+)\.(.+)", rf"{head}.\2"),
        ]
    return rules
