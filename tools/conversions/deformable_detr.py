"""Deformable DETR: names of its released code and of Hugging Face's class to this project's."""

import re

import torch
from torch import Tensor

from . import rename
from .resnet import resnet_rules

__all__ = ["convert", "convert_huggingface"]

PARAMETER = r"(weight|bias)"
ATTENTION = r"(sampling_offsets|attention_weights|value_proj|output_proj)"
# in_proj of PyTorch's attention holds the rows of queries, keys and values
SELF_ATTENTION = r"(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"

Rules = list[tuple[str, str | None]]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the released code, of any variant, by the names of a `SetDetector`."""
    encoder, decoder = (rf"transformer\.{part}\.layers\.(\d+)\." for part in ("encoder", "decoder"))
    return rename(
        weights,
        [
            *resnet_rules(r"backbone\.0\.body\."),
            *_level_rules(weights, ""),
            (r"transformer\.level_embed", "encoder.level_embed"),
            (
                rf"{encoder}self_attn\.{ATTENTION}\.{PARAMETER}",
                r"encoder.layers.\1.attention.\2.\3",
            ),
            (rf"{encoder}norm1\.{PARAMETER}", r"encoder.layers.\1.attention.norm.\2"),
            (rf"{encoder}norm2\.{PARAMETER}", r"encoder.layers.\1.ffn.norm.\2"),
            (rf"{encoder}(linear\d)\.{PARAMETER}", r"encoder.layers.\1.ffn.\2.\3"),
            (
                rf"{decoder}self_attn\.{SELF_ATTENTION}",
                r"decoder.layers.\1.self_attention.attention.\2",
            ),
            (
                rf"{decoder}cross_attn\.{ATTENTION}\.{PARAMETER}",
                r"decoder.layers.\1.cross_attention.\2.\3",
            ),
            (rf"{decoder}norm1\.{PARAMETER}", r"decoder.layers.\1.cross_attention.norm.\2"),
            (rf"{decoder}norm2\.{PARAMETER}", r"decoder.layers.\1.self_attention.norm.\2"),
            (rf"{decoder}norm3\.{PARAMETER}", r"decoder.layers.\1.ffn.norm.\2"),
            (rf"{decoder}(linear\d)\.{PARAMETER}", r"decoder.layers.\1.ffn.\2.\3"),
            (r"query_embed\.weight", "decoder.queries.embed.weight"),
            *_query_rules(r"transformer\."),
            *_head_rules(weights, r"(?:transformer\.decoder\.)?"),
        ],
    )


def convert_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `DeformableDetrForObjectDetection`, of any variant and of older versions too, by
    the names of a `SetDetector`."""
    encoder, decoder = (rf"model\.{part}\.layers\.(\d+)\." for part in ("encoder", "decoder"))
    rules = [
        *resnet_rules(r"model\.backbone\.(?:conv_encoder\.)?model\."),
        *_level_rules(weights, "model."),
        (r"model\.level_embed", "encoder.level_embed"),
        (r"model\.query_position_embeddings\.weight", "decoder.queries.embed.weight"),
        (rf"{encoder}self_attn\.{ATTENTION}\.{PARAMETER}", r"encoder.layers.\1.attention.\2.\3"),
        (
            rf"{encoder}self_attn_layer_norm\.{PARAMETER}",
            r"encoder.layers.\1.attention.norm.\2",
        ),
        (
            rf"{decoder}self_attn\.in_proj\.{PARAMETER}",
            r"decoder.layers.\1.self_attention.attention.in_proj_\2",
        ),
        (
            rf"{decoder}self_attn\.(?:o|out)_proj\.{PARAMETER}",
            r"decoder.layers.\1.self_attention.attention.out_proj.\2",
        ),
        (
            rf"{decoder}self_attn_layer_norm\.{PARAMETER}",
            r"decoder.layers.\1.self_attention.norm.\2",
        ),
        (
            rf"{decoder}encoder_attn\.{ATTENTION}\.{PARAMETER}",
            r"decoder.layers.\1.cross_attention.\2.\3",
        ),
        (
            rf"{decoder}encoder_attn_layer_norm\.{PARAMETER}",
            r"decoder.layers.\1.cross_attention.norm.\2",
        ),
        *_query_rules(r"model\."),
        *_head_rules(weights, r"(?:model\.decoder\.)?"),
    ]
    for part, layer in (("encoder", encoder), ("decoder", decoder)):
        new = rf"{part}.layers.\1.ffn."
        rules += [
            (rf"{layer}(?:mlp\.)?fc(\d)\.{PARAMETER}", rf"{new}linear\2.\3"),
            (rf"{layer}final_layer_norm\.{PARAMETER}", rf"{new}norm.\2"),
        ]
    return rename(_joined_projections(weights), rules)


def _level_rules(weights: dict[str, Tensor], prefix: str) -> Rules:
    """1×1 convolutions on C3 to C5, or on C5 alone, and 3×3 ones beyond."""
    names = [f"{prefix}input_proj.{index}.0.weight" for index in range(len(weights))]
    kernels = [weights[name].shape[-1] for name in names if name in weights]
    first = 6 - kernels.count(1)
    rules: Rules = []
    for index, kernel in enumerate(kernels):
        group = "projections" if kernel == 1 else "extra_levels"
        new = f"backbone.{group}.p{first + index}."
        old = rf"{prefix}input_proj\.{index}\."
        rules += [
            (rf"{old}0\.{PARAMETER}", rf"{new}\1"),
            (rf"{old}1\.{PARAMETER}", rf"{new}norm.\1"),
        ]
    return rules


def _query_rules(prefix: str) -> Rules:
    """Where the decoder starts, but for the learned queries; proposals of two-stage variants."""
    layers = {
        "reference_points": "reference_points",
        "enc_output": "memory",
        "enc_output_norm": "memory_norm",
        "pos_trans": "box_embed",
        "pos_trans_norm": "box_embed_norm",
    }
    return [
        (rf"{prefix}{old}\.{PARAMETER}", rf"decoder.queries.{new}.\1")
        for old, new in layers.items()
    ]


def _head_rules(weights: dict[str, Tensor], prefix: str) -> Rules:
    """Heads of each layer, the proposals' last; or the same ones again and again.

    Args:
        prefix: pattern under which refining variants may keep them once more.
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


def _joined_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections to queries, keys and values of a self-attention as one `in_proj`."""
    joined = dict(weights)
    for name in weights:
        if ".decoder.layers." in name and ".self_attn.q_proj." in name:
            names = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            parts = [joined.pop(part) for part in names if part in joined]
            joined[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
    return joined
