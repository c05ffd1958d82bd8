"""SMCA: names of the checkpoints that its released code writes for the single-scale system.

That code is DETR's with additions, and so are its names: those of backbone, encoder and heads, and
of the decoder's attentions (the modulated one holds its weights as PyTorch's does), linear layers
and first three norms, are DETR's. A decoder layer also has `norm4`, the norm of content plus
position, `point2`, the offsets, and `point3`, the scales: of all heads, x before y in each. The
first layer has `point1`, the perceptron of the reference points. Fixed scales have no `point3`.

These additions are known by name, and have not been compared with a published file: whoever
converts one is told of each name that is missing or left over. The released multi-scale code is not
the system of the paper; it is not converted.
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
    """The published names to those of the single-scale `SetDetector`."""
    return rename(weights, RULES)
