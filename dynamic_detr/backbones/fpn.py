"""Feature pyramid network: levels P2 to P6, strides 4 to 64; P6 is P5, max-pooled."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool

from .resnet import build_resnet_deform_backbone

__all__ = ["build_resnet_deform_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_resnet_deform_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's FPN over `build_resnet_deform_backbone`, as `MODEL.FPN` describes it.

    Its `size_divisibility` is the stride of P5 (32), as in Detectron2.
    """
    fpn = cfg.MODEL.FPN
    return FPN(
        bottom_up=build_resnet_deform_backbone(cfg, input_shape),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )
