"""Pyramid levels of the DETR family, projected from the stages of a ResNet.

A 1×1 convolution projects each output of the bottom-up network, and strided 3×3 convolutions add
coarser levels: C5 (DETR), C5 at stride 16 (DETR-DC5), C3 to C6 (Deformable DETR), C4 to C6 (SMCA).
"""

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from ..config import check_arguments
from .resnet import build_resnet_deform_backbone

__all__ = ["ProjectedLevels", "build_resnet_levels_backbone", "dilate_res5"]


class ProjectedLevels(Backbone):
    """Levels with C channels each: res3 becomes p3, res4 p4, res5 p5; extra levels are p6, p7, …

    Args:
        bottom_up: network with outputs named "res2" to "res5".
        out_channels: C.
        norm: norm after each convolution, a name for Detectron2's `get_norm`; "" for none.
        num_extra: number of levels beyond the coarsest output.

    Raises:
        ValueError: an argument is out of the range of its key.
    """

    def __init__(
        self, bottom_up: Backbone, *, out_channels: int, norm: str, num_extra: int
    ) -> None:
        super().__init__()
        check_arguments("MODEL.LEVELS", out_channels=out_channels, norm=norm, num_extra=num_extra)
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        self.in_features = sorted(shapes, key=lambda name: (shapes[name].stride, name))
        self.projections = nn.ModuleDict()
        self._out_feature_strides, self._out_feature_channels = {}, {}
        for name in self.in_features:
            level = name.replace("res", "p")
            self.projections[level] = _convolution(shapes[name].channels, out_channels, norm)
            self._out_feature_strides[level] = shapes[name].stride
        coarsest = self.in_features[-1]
        channels, number = shapes[coarsest].channels, int(coarsest[-1])
        self.extra_levels = nn.ModuleDict()
        for extra in range(1, num_extra + 1):
            level = f"p{number + extra}"
            self.extra_levels[level] = _convolution(channels, out_channels, norm, stride=2)
            self._out_feature_strides[level] = shapes[coarsest].stride * 2**extra
            channels = out_channels
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to levels (B, C, ⌈H / stride⌉, ⌈W / stride⌉) by name."""
        features = self.bottom_up(x)
        levels = {
            level: self.projections[level](features[name])
            for name, level in zip(self.in_features, self.projections, strict=True)
        }
        coarsest = features[self.in_features[-1]]
        for level, convolution in self.extra_levels.items():
            coarsest = levels[level] = convolution(coarsest)
        return levels


def _convolution(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Module:
    kernel = 1 if stride == 1 else 3
    convolution = Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        norm=get_norm(norm, out_channels),
    )
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def dilate_res5(resnet: ResNet) -> None:
    """Keep res5 at the stride of res4 and dilate its 3×3 convolutions by 2, except the first one.

    This is torchvision's `replace_stride_with_dilation`, which DETR-DC5 was trained with.
    Detectron2's `RES5_DILATION` also dilates the first convolution, so the same weights give other
    features.

    Raises:
        ValueError: the network has no res5, or res5 has no bottleneck blocks or is dilated already.
    """
    if "res5" not in resnet.stage_names:
        raise ValueError(
            'MODEL.LEVELS.DC5 is True, which requires "res5" in MODEL.RESNETS.OUT_FEATURES.'
        )
    stage = resnet.stages[resnet.stage_names.index("res5")]
    for index, block in enumerate(stage):
        if isinstance(block, BasicBlock):
            raise ValueError(
                "MODEL.LEVELS.DC5 is True, which requires MODEL.RESNETS.DEPTH of 50 or more."
            )
        if block.conv2.dilation != (1, 1):
            raise ValueError(
                "MODEL.LEVELS.DC5 is True, which requires MODEL.RESNETS.RES5_DILATION 1."
            )
        for convolution in (block.conv1, block.conv2, block.shortcut):
            if convolution is not None:
                convolution.stride = (1, 1)
        block.stride = 1
        for convolution in (block.conv2, getattr(block, "conv2_offset", None)):
            if convolution is not None:
                convolution.stride = (1, 1)
                convolution.dilation = convolution.padding = (2, 2) if index else (1, 1)
    resnet._out_feature_strides["res5"] //= 2


@BACKBONE_REGISTRY.register()
def build_resnet_levels_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ProjectedLevels:
    """Build `build_resnet_deform_backbone` with the levels that `MODEL.LEVELS` describes."""
    node = cfg.MODEL.LEVELS
    resnet = build_resnet_deform_backbone(cfg, input_shape)
    if node.DC5:
        dilate_res5(resnet)
    return ProjectedLevels(
        resnet, out_channels=node.OUT_CHANNELS, norm=node.NORM, num_extra=node.NUM_EXTRA
    )
