"""Sparse R-CNN: weights of its released code; the backbone has the names of Detectron2."""

from torch import Tensor

from . import rename

__all__ = ["convert"]

STAGE = r"head\.head_series\.(\d+)\."
LAYERS = {  # names in a stage
    r"self_attn\.": "self_attention.",
    r"norm1\.": "norm_attention.",
    r"inst_interact\.dynamic_layer\.": "interaction.filters.",
    r"inst_interact\.norm1\.": "interaction.norm_reduce.",
    r"inst_interact\.norm2\.": "interaction.norm_expand.",
    r"inst_interact\.out_layer\.": "interaction.readout.linear.",
    r"inst_interact\.norm3\.": "interaction.readout.norm.",
    r"norm2\.": "norm_interaction.",
    r"linear1\.": "ffn.0.",
    r"linear2\.": "ffn.3.",
    r"norm3\.": "norm_ffn.",
    r"cls_module\.": "class_branch.",
    r"reg_module\.": "box_branch.",
    r"class_logits\.": "class_logits.",
    r"bboxes_delta\.": "box_deltas.",
}
RULES = [
    (r"(backbone\..*)", r"\1"),
    (r"init_proposal_features\.weight", "decoder.query_embed.weight"),
    (r"init_proposal_boxes\.weight", "decoder.initial_boxes"),
    (r"criterion\..*|pixel_(mean|std)", None),
    *((rf"{STAGE}{old}(.*)", rf"decoder.stages.\1.{new}\2") for old, new in LAYERS.items()),
]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the released code."""
    return rename(weights, RULES)
