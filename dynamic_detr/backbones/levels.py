"""Level builders of the DETR family: levels of a pyramid straight from the stages of a ResNet.

C5 alone (DETR), C5 at stride 16 (DETR-DC5), C3 to C6 (Deformable DETR), C4 to C6 (SMCA): each
output of the bottom-up network is projected by a 1×1 convolution, and coarser levels are added by
strided 3×3 convolutions.
"""

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import Tensor, nn

from ..config import check_arguments
from .resnet import build_resnet_deform_backbone

__all__ = ["ProjectedLevels", "build_resnet_levels_backbone", "dilate_res5"]


class ProjectedLevels(Backbone):
    """Levels of one number of channels; res3 becomes p3, res4 p4, res5 p5, and then p6, …

    Args:
        bottom_up: network whose outputs, fine to coarse, are named "res2" to "res5".
        out_channels: C, channels of every level.
        norm: name of the norm after each convolution, as Detectron2's `get_norm` takes it; "" for
            none.
        num_extra: levels beyond the coarsest output.

    Raises:
        ValueError: an argument is out of its key's range.
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
        """Images (B, 3, H, W) to levels (B, C, ⌈H / stride⌉, ⌈W / stride⌉) by name."""
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
    """Leaves res5 at the stride of res4 and dilates its convolutions by 2, but for the first one.

    As torchvision's `replace_stride_with_dilation`, with which DETR-DC5 was trained; Detectron2's
    `RES5_DILATION` dilates the first one too, which gives other numbers with the same weights.

    Raises:
        ValueError: the network has no res5, or not of bottleneck blocks.
    """
    if "res5" not in resnet.stage_names:
        raise ValueError('MODEL.LEVELS.DC5 is True; it needs "res5" in MODEL.RESNETS.OUT_FEATURES.')
    stage = resnet.stages[resnet.stage_names.index("res5")]
    for index, block in enumerate(stage):
        if not isinstance(block, BottleneckBlock):
            raise ValueError(
                "MODEL.LEVELS.DC5 is True; it needs MODEL.RESNETS.DEPTH of 50 or more."
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
    """Levels of `build_resnet_deform_backbone`, as `MODEL.LEVELS` describes them."""
    node = cfg.MODEL.LEVELS
    resnet = build_resnet_deform_backbone(cfg, input_shape)
    if node.DC5:
        dilate_res5(resnet)
    return ProjectedLevels(
        resnet, out_channels=node.OUT_CHANNELS, norm=node.NORM, num_extra=node.NUM_EXTRA
    )
