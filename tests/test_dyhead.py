"""DyHead in a Detectron2 backbone: arithmetic and names of the released code, and integration."""

import convert_weights
import pytest
import torch
from conftest import ROOT
from conversions.dyhead import convert
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from helpers import batch_pyramid, dynamic_encoder, model_without_memory, random_levels
from published import dyhead_block as published_block
from published import dyhead_faster_rcnn, dyhead_retinanet, weights_of
from reference.dyhead import dyhead_block

from dynamic_detr.encoders import EncodedFPN
from dynamic_detr.engine.optimizer import parameter_groups
from dynamic_detr.files.config_file import read_config

CONFIGS = ROOT / "configs" / "DyHead"
FASTER_RCNN, RETINANET = "faster_rcnn_R_50_FPN_dyhead", "retinanet_R_50_FPN_dyhead"


CHANNELS, GROUPS = 8, 4


def config(name: str, *options: object) -> CfgNode:
    return read_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", *options])


def small(name: str, *options: object) -> CfgNode:
    """Return a config with ResNet-18, GroupNorm, 32 channels and one block."""
    resnet = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    norm = ("MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0)
    head = ("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.DYNAMIC_ENCODER.NUM_BLOCKS", 1)
    return config(name, *resnet, *norm, *head, *options)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_legacy_blocks_equal_the_reference(scale):
    """The weights have the published names. The batch is padded, and the results depend on it."""
    sizes = [(100, 136), (64, 190)]
    images = [random_levels(size, CHANNELS) for size in sizes]
    pyramid = batch_pyramid(images, sizes, (128, 192), garbage=1.0)
    blocks = [
        {
            name: scale * w.double()
            for name, w in weights_of(published_block("", CHANNELS), "cpu").items()
        }
        for _ in range(2)
    ]
    tower = {
        f"backbone.dyhead_tower.{number}.{name}": weight
        for number, block in enumerate(blocks)
        for name, weight in block.items()
    }
    model = dynamic_encoder(CHANNELS, num_blocks=2, offsets="legacy").double()
    converted = {k.removeprefix("backbone.encoder."): w for k, w in convert(tower).items()}
    model.load_state_dict(converted)
    expected = list(pyramid.features)
    for block in blocks:
        expected = dyhead_block(expected, block, GROUPS)
    with torch.no_grad():
        out = model(pyramid).features
    torch.testing.assert_close(list(out), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "published"), [(FASTER_RCNN, dyhead_faster_rcnn), (RETINANET, dyhead_retinanet)]
)
def test_published_weights_fit_the_model(name, published):
    weights = weights_of(published())
    model = model_without_memory(CONFIGS / f"{name}.yaml")
    fitted = convert_weights.fit(convert(weights), model.state_dict(), num_classes=80)
    assert len(fitted) == len(weights) - ("pixel_mean" in weights)


@pytest.mark.parametrize(
    ("name", "levels", "coarsest"), [(FASTER_RCNN, range(2, 7), 64), (RETINANET, range(3, 8), 128)]
)
def test_backbone_encodes_the_levels_of_the_fpn(name, levels, coarsest):
    backbone = build_backbone(small(name)).eval()
    assert isinstance(backbone, EncodedFPN)
    shapes = backbone.output_shape()
    assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {
        f"p{level}": (32, 2**level) for level in levels
    }
    image = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        plain, found = backbone.fpn(image), backbone(image)
    assert list(found) == list(shapes)
    for level, features in found.items():
        assert features.shape == plain[level].shape and not torch.equal(features, plain[level])
    assert backbone.size_divisibility == 32
    legacy = build_backbone(small(name, "MODEL.DYNAMIC_ENCODER.OFFSETS", "legacy"))
    assert legacy.size_divisibility == coarsest


def test_p6_is_computed_from_p5():
    fpn = build_backbone(small(RETINANET)).fpn
    assert fpn.top_block.in_feature == "p5" and fpn.top_block.p6.in_channels == 32


def test_deformable_resnet_and_activation_checkpointing():
    """Every parameter gets a gradient."""
    options = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    deform = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True])
    recompute = ("MODEL.SET_DETECTOR.ACTIVATION_CHECKPOINT.ENCODER", True)
    backbone = build_backbone(small(FASTER_RCNN, *options, *deform, *recompute))
    assert hasattr(backbone.bottom_up.stages[3][0], "conv2_offset")
    levels = backbone(torch.randn(1, 3, 64, 64))
    sum(level.square().sum() for level in levels.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name


def test_bottom_up_network_is_the_pretrained_part(tmp_path):
    """It has a smaller learning rate and takes ImageNet weights."""
    model = build_model(small(FASTER_RCNN))
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.0, backbone_multiplier=0.1)
    slow = {p for group in groups for p in group["params"] if group["lr"] == 0.1}
    assert slow == set(model.backbone.bottom_up.parameters())
    stem = torch.randn_like(model.backbone.bottom_up.stem.conv1.weight)
    path = tmp_path / "imagenet.pth"
    torch.save({"model": {"stem.conv1.weight": stem}, "matching_heuristics": True}, path)
    DetectionCheckpointer(model).load(str(path))
    torch.testing.assert_close(model.backbone.bottom_up.stem.conv1.weight.data, stem)
