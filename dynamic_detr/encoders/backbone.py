"""An encoder as a part of a Detectron2 backbone: Dynamic Head (the dynamic encoder's blocks on the
levels of an FPN) under Faster R-CNN, RetinaNet or any other detector of Detectron2's."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ..backbones import build_resnet_deform_backbone
from ..structures import Pyramid
from .dynamic import DynamicEncoder

__all__ = [
    "EncodedFPN",
    "build_resnet_fpn_dyhead_backbone",
    "build_retinanet_resnet_fpn_dyhead_backbone",
]


class EncodedFPN(Backbone):
    """A feature pyramid network whose levels pass through an encoder.

    A backbone is not told how far its images are padded: the encoder takes every map as true as a
    whole.

    Args:
        fpn: whose outputs, fine to coarse, make the pyramid.
        encoder: `forward(pyramid) -> pyramid` of the same shape.
        size_divisibility: images are padded to a multiple of this many pixels; None for what the
            FPN asks for.
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
        """The pretrained part."""
        return self.fpn.bottom_up

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility or self.fpn.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What newer Detectron2s ask beside the divisibility."""
        return getattr(self.fpn, "padding_constraints", {})

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.fpn.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, C, H / stride, W / stride) by name."""
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
    # the published weights were trained, and depend on, images padded to the coarsest stride
    legacy = cfg.MODEL.DYNAMIC_ENCODER.OFFSETS == "legacy"
    coarsest = max(shape.stride for shape in shapes.values())
    return EncodedFPN(fpn, encoder, coarsest if legacy else None)


def _fpn(cfg: CfgNode, input_shape: ShapeSpec, top_block: nn.Module) -> FPN:
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up=build_resnet_deform_backbone(cfg, input_shape),
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=top_block,
        fuse_type=node.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EncodedFPN:
    """P2 to P6 for Faster R-CNN: Detectron2's FPN over `build_resnet_deform_backbone`, and the
    dynamic encoder of `MODEL.DYNAMIC_ENCODER`."""
    return _with_dynamic_encoder(cfg, _fpn(cfg, input_shape, LastLevelMaxPool()))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EncodedFPN:
    """P3 to P7 for RetinaNet: as `build_resnet_fpn_dyhead_backbone`, but with P6 and P7 by strided
    convolutions on P5, as the published DyHead has them (Detectron2's RetinaNet: on C5)."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, "p5")
    return _with_dynamic_encoder(cfg, _fpn(cfg, input_shape, top_block))
