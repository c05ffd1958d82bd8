"""Detectron2 backbones with an encoder on an FPN: DyHead for Faster R-CNN and RetinaNet."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from torch import Tensor, nn

from ..backbones import build_resnet_deform_backbone, build_resnet_deform_fpn_backbone
from ..structures import Pyramid
from .dynamic import DynamicEncoder

__all__ = [
    "EncodedFPN",
    "build_resnet_fpn_dyhead_backbone",
    "build_retinanet_resnet_fpn_dyhead_backbone",
]


class EncodedFPN(Backbone):
    """Feature pyramid network followed by an encoder.

    A backbone receives no image sizes, so the encoder treats the padding as a part of the image.

    Args:
        fpn: backbone whose outputs, fine to coarse, are the levels of the pyramid.
        encoder: module from a pyramid to a pyramid of the same shape.
        size_divisibility: images are padded to a multiple of this, in pixels; None for that of the
            FPN.
    """

    def __init__(
        self, fpn: Backbone, encoder: nn.Module, size_divisibility: int | None = None
    ) -> None:
        super().__init__()
        self.fpn = fpn
        self.encoder = encoder
        self._size_divisibility = size_divisibility

    @property
    def bottom_up(self) -> nn.Module:
        """Return the pretrained part of the backbone."""
        return self.fpn.bottom_up

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility or self.fpn.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Return the padding constraints of the FPN; Detectron2 0.5 has none."""
        return getattr(self.fpn, "padding_constraints", {})

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.fpn.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to levels (B, C, H / stride, W / stride) by name."""
        levels = self.fpn(images)
        shapes = self.output_shape()
        features = [
            level.contiguous(memory_format=torch.channels_last) for level in levels.values()
        ]
        pyramid = Pyramid(features, [shapes[name].stride for name in levels])
        return dict(zip(levels, self.encoder(pyramid).features, strict=True))


def _with_dynamic_encoder(cfg: CfgNode, fpn: FPN) -> EncodedFPN:
    shapes = fpn.output_shape()
    encoder = DynamicEncoder(cfg, channels=cfg.MODEL.FPN.OUT_CHANNELS, num_levels=len(shapes))
    # the published weights were trained with images padded to the coarsest stride
    legacy = cfg.MODEL.DYNAMIC_ENCODER.OFFSETS == "legacy"
    coarsest = max(shape.stride for shape in shapes.values())
    return EncodedFPN(fpn, encoder, coarsest if legacy else None)


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EncodedFPN:
    """Build an FPN with the levels P2 to P6 and the encoder of `MODEL.DYNAMIC_ENCODER`."""
    return _with_dynamic_encoder(cfg, build_resnet_deform_fpn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EncodedFPN:
    """Build an FPN with the levels P3 to P7 and the encoder of `MODEL.DYNAMIC_ENCODER`.

    P6 is computed from P5, as in the published DyHead; Detectron2's RetinaNet computes it from C5.
    """
    node = cfg.MODEL.FPN
    fpn = FPN(
        bottom_up=build_resnet_deform_backbone(cfg, input_shape),
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=LastLevelP6P7(node.OUT_CHANNELS, node.OUT_CHANNELS, "p5"),
        fuse_type=node.FUSE_TYPE,
    )
    return _with_dynamic_encoder(cfg, fpn)
