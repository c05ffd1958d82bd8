"""DyHead's own code: Dynamic Head in a Detectron2 backbone, under Faster R-CNN or RetinaNet.

Its `DyConv` holds three convolutions, of strides 1, 1 and 2. Its forward pass applies the second
one to the level itself, the third one, whose result is half as large, to the finer level, and
upsamples that of the first one, which so is for the coarser level. The weights were trained with
`MODEL.DYNAMIC_ENCODER.OFFSETS` "legacy".
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
    """Published names to those of the model of configs/DyHead."""
    renamed = rename(weights, RULES)
    for name, weight in renamed.items():
        if name.endswith(".scale.weight"):  # a 1×1 convolution there, a linear layer here
            renamed[name] = weight.flatten(1)
    return renamed
