"""Backbones registered with Detectron2: ResNet and ResNeXt with deformable convolution.

Names that ``MODEL.BACKBONE.NAME`` may give, beside all of Detectron2's own:

- ``build_resnet_deform_backbone``: the bottom-up network alone, its outputs chosen by
  ``MODEL.RESNETS.OUT_FEATURES``;
- ``build_resnet_deform_fpn_backbone``: the same under an FPN, levels P2 to P6.
"""

from .deform_block import DeformBottleneckBlock, DeformConv2d
from .fpn import build_resnet_deform_fpn_backbone
from .recompute import checkpoint_resnet_stages
from .resnet import build_resnet_deform_backbone, make_resnet

__all__ = [
    "DeformBottleneckBlock",
    "DeformConv2d",
    "build_resnet_deform_backbone",
    "build_resnet_deform_fpn_backbone",
    "checkpoint_resnet_stages",
    "make_resnet",
]
