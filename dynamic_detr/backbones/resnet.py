"""ResNet and ResNeXt with deformable convolution in chosen stages.

The network is Detectron2's `ResNet` made of its blocks, with `DeformBottleneckBlock` in the stages
that ask for it; where none does, it is Detectron2's own network, name by name.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet

from .deform_block import DeformBottleneckBlock

__all__ = ["build_resnet_deform_backbone", "make_resnet"]

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def make_resnet(
    depth: int,
    *,
    in_channels: int = 3,
    out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    freeze_at: int = 0,
    norm: str = "FrozenBN",
    stem_out_channels: int = 64,
    res2_out_channels: int = 256,
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_in_1x1: bool = False,
    res5_dilation: int = 1,
    deform_on_per_stage: Sequence[bool] = (False, False, False, False),
    deform_modulated: bool = True,
    deform_num_groups: int = 1,
) -> ResNet:
    """Makes a ResNet (or, with more than one group, a ResNeXt).

    Args:
        depth: 18, 34, 50, 101 or 152; the first two have basic blocks, which take no deformable
            convolution, no dilation and no groups.
        in_channels: channels of the image.
        out_features: which of "stem", "res2" … "res5" are returned; stages above the last one are
            not made.
        freeze_at: how many stages from the stem on are not trained (1 is the stem alone).
        norm: a name that Detectron2's `get_norm` knows.
        stem_out_channels: channels of the stem.
        res2_out_channels: channels of res2, doubled at every later stage (64 for depth 18 and 34).
        num_groups, width_per_group: groups of the 3×3 convolutions, and channels of each in res2.
        stride_in_1x1: a stage's stride is in its first 1×1 convolution (weights of MSRA) or in
            the 3×3 one (all others).
        res5_dilation: 2 leaves res5 at stride 16 and dilates its convolutions.
        deform_on_per_stage: for res2 … res5, whether its 3×3 convolutions are deformable.
        deform_modulated: deformable convolutions are modulated (v2) or not (v1).
        deform_num_groups: groups of channels that have their own offsets.

    Returns:
        The network; images (B, in_channels, H, W) give a dict of the named features.

    Raises:
        ValueError: the arguments do not fit together; the line names the configuration key.
    """
    deform_on_per_stage = list(deform_on_per_stage)
    _check(depth, res2_out_channels, num_groups, res5_dilation, deform_on_per_stage)
    stem = BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
    stages = []
    channels = stem_out_channels
    for index, (num_blocks, deform) in enumerate(
        zip(BLOCKS_PER_STAGE[depth], deform_on_per_stage, strict=True)
    ):
        dilation = res5_dilation if index == 3 else 1
        stride = 1 if index == 0 or dilation == 2 else 2
        out_channels = res2_out_channels * 2**index
        options = {}
        if depth < 50:
            block = BasicBlock
        else:
            block = DeformBottleneckBlock if deform else BottleneckBlock
            options = {
                "bottleneck_channels": num_groups * width_per_group * 2**index,
                "num_groups": num_groups,
                "stride_in_1x1": stride_in_1x1,
                "dilation": dilation,
            }
        if deform:
            options["deform_modulated"] = deform_modulated
            options["deform_num_groups"] = deform_num_groups
        stages.append(
            ResNet.make_stage(
                block,
                num_blocks,
                stride_per_block=[stride] + [1] * (num_blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                norm=norm,
                **options,
            )
        )
        channels = out_channels
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


def _check(
    depth: int,
    res2_out_channels: int,
    num_groups: int,
    res5_dilation: int,
    deform_on_per_stage: list[bool],
) -> None:
    if depth not in BLOCKS_PER_STAGE:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {depth}; it must be one of {sorted(BLOCKS_PER_STAGE)}."
        )
    if res5_dilation not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION is {res5_dilation}; it must be 1 or 2.")
    if len(deform_on_per_stage) != 4:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE has {len(deform_on_per_stage)} entries; "
            "it must have 4, for res2 to res5."
        )
    if depth >= 50:
        return
    wanted = {
        "RES2_OUT_CHANNELS": (res2_out_channels, 64),
        "NUM_GROUPS": (num_groups, 1),
        "RES5_DILATION": (res5_dilation, 1),
        "DEFORM_ON_PER_STAGE": (deform_on_per_stage, [False] * 4),
    }
    for key, (value, only) in wanted.items():
        if value != only:
            raise ValueError(
                f"MODEL.RESNETS.{key} is {value}; a ResNet-{depth} has basic blocks, "
                f"which need {only}."
            )


@BACKBONE_REGISTRY.register()
def build_resnet_deform_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The network that `MODEL.RESNETS` and `MODEL.BACKBONE.FREEZE_AT` describe."""
    resnets = cfg.MODEL.RESNETS
    return make_resnet(
        resnets.DEPTH,
        in_channels=input_shape.channels,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=resnets.NORM,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        res5_dilation=resnets.RES5_DILATION,
        deform_on_per_stage=resnets.DEFORM_ON_PER_STAGE,
        deform_modulated=resnets.DEFORM_MODULATED,
        deform_num_groups=resnets.DEFORM_NUM_GROUPS,
    )
