"""ResNet and ResNeXt with deformable convolution in chosen stages.

Detectron2 builds the network; the 3×3 convolutions of the chosen stages are then made deformable.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet, build_resnet_backbone

from ..config import require
from ..detectron2_keys import RANGES
from .deform_block import DeformBottleneckBlock

__all__ = ["build_resnet_deform_backbone", "deform_stages"]


def deform_stages(
    resnet: ResNet, stages: Sequence[str], *, modulated: bool, num_groups: int
) -> None:
    """Make the 3×3 convolutions of some stages deformable, in place.

    Args:
        resnet: a network of bottleneck blocks.
        stages: "res2" to "res5"; stages that the network does not have are skipped.
        modulated: use modulated deformable convolution (Deformable ConvNets v2), else plain (v1).
        num_groups: number of deformable groups of input channels, each with its own offsets.

    Raises:
        ValueError: a stage has no bottleneck blocks, or its channels cannot be split
            into `num_groups`.
    """
    for name in resnet.stage_names:
        if name not in stages:
            continue
        stage = getattr(resnet, name)
        for index, block in enumerate(stage):
            if not isinstance(block, BottleneckBlock):
                raise ValueError(
                    f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is True for {name}, which requires "
                    "MODEL.RESNETS.DEPTH of 50 or more."
                )
            stage[index] = DeformBottleneckBlock(
                block, deform_modulated=modulated, deform_num_groups=num_groups
            )


@BACKBONE_REGISTRY.register()
def build_resnet_deform_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the network that `MODEL.RESNETS` and `MODEL.BACKBONE.FREEZE_AT` describe.

    Raises:
        ValueError: the keys are out of range or inconsistent.
    """
    resnets = cfg.MODEL.RESNETS
    for key in ("DEPTH", "RES5_DILATION", "DEFORM_ON_PER_STAGE"):
        name = f"MODEL.RESNETS.{key}"
        require(name, resnets[key], RANGES[name])
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    try:
        resnet = build_resnet_backbone(plain, input_shape)
    except AssertionError as error:  # its message names the key
        raise ValueError(str(error)) from error
    stages = ("res2", "res3", "res4", "res5")
    deform_stages(
        resnet,
        [name for name, on in zip(stages, resnets.DEFORM_ON_PER_STAGE, strict=True) if on],
        modulated=resnets.DEFORM_MODULATED,
        num_groups=resnets.DEFORM_NUM_GROUPS,
    )
    return resnet
