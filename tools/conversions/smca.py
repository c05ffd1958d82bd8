"""SMCA: weights of the released code of the single-scale model.

The released code extends DETR's and keeps its parameter names. Each decoder layer also has `norm4`,
the LayerNorm of content plus position; `point2`, which predicts the offsets; and `point3`, which
predicts the scales, in the order x, y for each head. Models with fixed scales have no `point3`. The
first layer has `point1`, the MLP that predicts the reference points.

The parameter names were read from the released code and have not been checked against a published
checkpoint. The released multi-scale code differs from the paper and is not supported.
"""

from torch import Tensor

from . import rename
from .detr import PUBLISHED

__all__ = ["convert"]

LAYER = r"transformer\.(decoder\.layers\.\d+\.)"

RULES = [
    (rf"{LAYER}multihead_attn\.(.+)", r"\1co_attention.attention.\2"),
    (rf"{LAYER}norm2\.(.+)", r"\1co_attention.norm.\2"),
    (rf"{LAYER}norm4\.(.+)", r"\1guide_norm.\2"),
    (r"transformer\.decoder\.layers\.0\.point1\.(.+)", r"decoder.reference_points.\1"),
    (rf"{LAYER}point2\.(.+)", r"\1co_attention.prior.offsets.\2"),
    (rf"{LAYER}point3\.(.+)", r"\1co_attention.prior.scales.\2"),
    *PUBLISHED,
]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the released code."""
    return rename(weights, RULES)
