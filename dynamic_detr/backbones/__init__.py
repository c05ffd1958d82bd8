"""Backbones registered with Detectron2: ResNet and ResNeXt with deformable convolution.

Names that ``MODEL.BACKBONE.NAME`` may give, beside all of Detectron2's own:

- ``build_resnet_deform_backbone``: the bottom-up network alone, its outputs chosen by
  ``MODEL.RESNETS.OUT_FEATURES``;
- ``build_resnet_deform_fpn_backbone``: the same under an FPN, levels P2 to P6;
- ``build_resnet_levels_backbone``: its outputs projected, and coarser levels added, as
  ``MODEL.LEVELS`` says: C5 alone, DC5, C3 to C6.
"""

from .deform_block import DeformBottleneckBlock, DeformConv2d
from .fpn import build_resnet_deform_fpn_backbone
from .levels import ProjectedLevels, build_resnet_levels_backbone, dilate_res5
from .recompute import checkpoint_resnet_stages
from .resnet import build_resnet_deform_backbone, make_resnet
from .unused import freeze_unused

__all__ = [
    "DeformBottleneckBlock",
    "DeformConv2d",
    "ProjectedLevels",
    "build_resnet_deform_backbone",
    "build_resnet_deform_fpn_backbone",
    "build_resnet_levels_backbone",
    "checkpoint_resnet_stages",
    "dilate_res5",
    "freeze_unused",
    "make_resnet",
]
