"""DyHead: weights of its released code, for Faster R-CNN and RetinaNet.

`DyConv` has three convolutions of strides 1, 1 and 2. Its forward pass applies the first one to the
coarser level and upsamples the result, the second one to the level itself, and the third one to the
finer level. The weights need `MODEL.DYNAMIC_ENCODER.OFFSETS` "legacy".
"""

from torch import Tensor

from . import rename

__all__ = ["convert"]

BRANCHES = ("coarser", "same", "finer")  # the order in `DyConv`
BLOCK, NEW = r"backbone\.dyhead_tower\.(\d+)\.", r"backbone.encoder.blocks.\1."
RULES = [
    (r"backbone\.backbone\.(.*)", r"backbone.fpn.\1"),
    *(
        rule
        for index, branch in enumerate(BRANCHES)
        for rule in (
            (rf"{BLOCK}DyConv\.{index}\.conv\.(.*)", rf"{NEW}{branch}.conv.\2"),
            (rf"{BLOCK}DyConv\.{index}\.bn\.(.*)", rf"{NEW}{branch}.norm.\2"),
        )
    ),
    (rf"{BLOCK}AttnConv\.1\.(.*)", rf"{NEW}scale.\2"),
    (rf"{BLOCK}relu\.fc\.0\.(.*)", rf"{NEW}dyrelu.reduce.\2"),
    (rf"{BLOCK}relu\.fc\.2\.(.*)", rf"{NEW}dyrelu.expand.\2"),
    (rf"{BLOCK}offset\.(.*)", rf"{NEW}offset.\2"),
    (r"pixel_(mean|std)|.*anchor_generator\.cell_anchors.*", None),
    (r"((proposal_generator|roi_heads|head)\..*)", r"\1"),  # Detectron2's own
]


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the released code."""
    renamed = rename(weights, RULES)
    for name, weight in renamed.items():
        if name.endswith(".scale.weight"):  # from a 1×1 convolution to a linear layer
            renamed[name] = weight.flatten(1)
    return renamed
