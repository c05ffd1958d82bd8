"""Levels projected from the stages of a ResNet, and freezing of unused parameters."""

import itertools
import logging

import pytest
import torch
import torchvision
from conversions import rename
from conversions.resnet import resnet_rules
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import small_config
from torch import nn

from dynamic_detr import add_dynamic_detr_config
from dynamic_detr.backbones import dilate_res5, freeze_unused

CHANNELS = 24


def config(depth: int = 50, dilation: int = 1, **levels: object) -> CfgNode:
    """Return the configuration of a narrow network with values for `MODEL.LEVELS`."""
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_levels_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.OUT_FEATURES = depth, "GN", levels.pop("OUT_FEATURES")
    resnets.STEM_OUT_CHANNELS, resnets.RES5_DILATION = 32, dilation
    resnets.RES2_OUT_CHANNELS = 64 if depth < 50 else 128
    resnets.WIDTH_PER_GROUP = 64 if depth < 50 else 32
    cfg.MODEL.LEVELS.OUT_CHANNELS = CHANNELS
    cfg.MODEL.LEVELS.NORM = levels.pop("NORM", "")
    cfg.MODEL.LEVELS.merge_from_other_cfg(CfgNode(levels))
    return cfg


CASES = {  # OUT_FEATURES, NUM_EXTRA, DC5: names and strides
    "C5": (["res5"], 0, False, {"p5": 32}),
    "DC5": (["res5"], 0, True, {"p5": 16}),
    "C3 to C6": (["res3", "res4", "res5"], 1, False, {"p3": 8, "p4": 16, "p5": 32, "p6": 64}),
    "C4 to C7": (["res4", "res5"], 2, False, {"p4": 16, "p5": 32, "p6": 64, "p7": 128}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_strides_shapes_and_gradients(case):
    features, extra, dc5, strides = case
    cfg = config(OUT_FEATURES=features[::-1], NUM_EXTRA=extra, DC5=dc5)
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == strides
    assert {shape.channels for shape in shapes.values()} == {CHANNELS}
    images = torch.randn(2, 3, 150, 97)
    levels = backbone(images)
    assert list(levels) == list(strides)
    for name, stride in strides.items():
        size = (-(-150 // stride), -(-97 // stride))
        assert levels[name].shape == (2, CHANNELS, *size), name
    sum(level.square().sum() for level in levels.values()).backward()
    still = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_levels_equal_their_convolutions():
    """Extra levels start from the output of the ResNet, not from its projection."""
    cfg = config(18, OUT_FEATURES=["res4", "res5"], NUM_EXTRA=2, NORM="GN")
    cfg.MODEL.LEVELS.OUT_CHANNELS = 64  # divides into the 32 groups of GN
    backbone = build_backbone(cfg).eval()
    names = {name.rpartition(".")[0] for name in backbone.state_dict() if "bottom_up" not in name}
    layers = ["projections.p4", "projections.p5", "extra_levels.p6", "extra_levels.p7"]
    assert names == {*layers, *(f"{layer}.norm" for layer in layers)}
    image = torch.randn(1, 3, 128, 128)
    raw = backbone.bottom_up(image)

    def layer(kind: nn.ModuleDict, name: str, x: torch.Tensor) -> torch.Tensor:
        module = kind[name]
        options = {"stride": 1, "padding": 0} if kind is backbone.projections else {}
        options = options or {"stride": 2, "padding": 1}
        x = nn.functional.conv2d(x, module.weight, module.bias, **options)
        return nn.functional.group_norm(x, 32, module.norm.weight, module.norm.bias)

    wanted = {
        name: layer(backbone.projections, name, raw[f"res{name[1]}"]) for name in ("p4", "p5")
    }
    wanted["p6"] = layer(backbone.extra_levels, "p6", raw["res5"])
    wanted["p7"] = layer(backbone.extra_levels, "p7", wanted["p6"])
    torch.testing.assert_close(backbone(image), wanted, rtol=1e-4, atol=1e-4)


def test_dc5_equals_torchvision():
    """The weights are the same, with random statistics of the frozen norms."""
    theirs = torchvision.models.resnet50(
        replace_stride_with_dilation=[False, False, True], width_per_group=8
    ).eval()
    with torch.no_grad():
        for name, value in itertools.chain(theirs.named_parameters(), theirs.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                value.uniform_(0.5, 1.5) if "weight" in name or "var" in name else value.normal_()
    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.OUT_FEATURES, resnets.STRIDE_IN_1X1, resnets.WIDTH_PER_GROUP = ["res5"], False, 8
    ours = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    plain = ours.output_shape()["res5"].stride
    dilate_res5(ours)
    assert (plain, ours.output_shape()["res5"].stride) == (32, 16)
    rules = [*resnet_rules("", ""), (r"fc\..*", None)]
    ours.load_state_dict(rename(theirs.state_dict(), rules))
    image = torch.randn(1, 3, 96, 130, dtype=torch.float64, requires_grad=True)
    body = nn.Sequential(*list(theirs.children())[:-2]).double()
    wanted, found = body(image), ours.double().eval()(image)["res5"]
    assert found.shape == (1, 2048, 6, 9)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, image, upstream)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_dc5_with_deformable_convolution():
    """The convolution of the offsets has the stride and dilation of the deformable one."""
    cfg = config(OUT_FEATURES=["res5"], DC5=True)
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = True
    with_offsets = build_backbone(cfg).eval()
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain = build_backbone(cfg).eval()
    weights = {k: v for k, v in with_offsets.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(weights)
    with torch.no_grad():  # modulations of 1, offsets of 0
        for name, parameter in with_offsets.named_parameters():
            if "conv2_offset.weight" in name:
                parameter.zero_()
            elif "conv2_offset.bias" in name:
                parameter.copy_(torch.tensor([0.0] * 18 + [40.0] * 9))
        image = torch.randn(1, 3, 64, 96)
        found, wanted = with_offsets(image)["p5"], plain(image)["p5"]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"OUT_FEATURES": ["res4"], "DC5": True}, 'requires "res5" in MODEL.RESNETS.OUT_FEATURES'),
        ({"depth": 18, "OUT_FEATURES": ["res5"], "DC5": True}, "requires MODEL.RESNETS.DEPTH"),
        ({"OUT_FEATURES": ["res5"], "DC5": True, "dilation": 2}, "requires .*RES5_DILATION 1"),
        ({"OUT_FEATURES": ["res5"], "NUM_EXTRA": -1}, "MODEL.LEVELS.NUM_EXTRA is -1"),
    ],
)
def test_wrong_options_raise_one_line(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        build_backbone(config(**options))
    assert "\n" not in str(error.value)


class TestFreezeUnused:
    def test_fpn_levels_that_are_not_read_are_frozen(self, caplog):
        cfg = small_config(IN_FEATURES=["p3", "p4", "p5", "p6"])
        with caplog.at_level(logging.INFO, logger="dynamic_detr.backbones.unused"):
            model = build_model(cfg)
        frozen = {n for n, p in model.backbone.named_parameters() if not p.requires_grad}
        parts = ("fpn_lateral2", "fpn_output2")
        assert frozen == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        assert all(name in caplog.text for name in frozen)
        images = torch.randn(2, 3, 64, 96)
        features = model.train().backbone(images)
        sum(features[name].sum() for name in model.in_features).backward()
        for name, parameter in model.backbone.named_parameters():
            assert (parameter.grad is None) == (name in frozen), name

    def test_nothing_is_frozen_if_all_levels_are_read(self):
        backbone = build_backbone(small_config()).eval()
        calls = []
        backbone.register_forward_pre_hook(lambda *_: calls.append(1))
        freeze_unused(backbone, list(backbone.output_shape()))
        assert all(p.requires_grad for p in backbone.parameters()) and not calls
        freeze_unused(backbone, ["p6"])
        assert calls and not backbone.training
        left = {n for n, p in backbone.named_parameters() if p.requires_grad if "fpn" in n}
        assert {name.rpartition(".")[0] for name in left} == {"fpn_lateral5", "fpn_output5"}
