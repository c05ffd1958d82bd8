"""Backbones registered with Detectron2: ResNet and ResNeXt with deformable convolution.

Values of ``MODEL.BACKBONE.NAME`` beside Detectron2's own:

- ``build_resnet_deform_backbone``: the bottom-up network; its outputs are
  ``MODEL.RESNETS.OUT_FEATURES``;
- ``build_resnet_deform_fpn_backbone``: the same under an FPN with levels P2 to P6;
- ``build_resnet_levels_backbone``: its outputs projected to one number of channels, and coarser
  levels, as ``MODEL.LEVELS`` describes (C5, DC5, C3 to C6).
"""

from .deform_block import DeformBottleneckBlock, DeformConv2d
from .fpn import build_resnet_deform_fpn_backbone
from .levels import ProjectedLevels, build_resnet_levels_backbone, dilate_res5
from .recompute import checkpoint_resnet_stages
from .resnet import build_resnet_deform_backbone, deform_stages
from .unused import freeze_unused

__all__ = [
    "DeformBottleneckBlock",
    "DeformConv2d",
    "ProjectedLevels",
    "build_resnet_deform_backbone",
    "build_resnet_deform_fpn_backbone",
    "build_resnet_levels_backbone",
    "checkpoint_resnet_stages",
    "deform_stages",
    "dilate_res5",
    "freeze_unused",
]
