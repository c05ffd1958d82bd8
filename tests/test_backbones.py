"""Deformable ResNets: against torchvision's operator, and against Detectron2's own networks."""

import itertools

import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import resnet as detectron2_resnet
from torch import Tensor, nn

from dynamic_detr.backbones import DeformBottleneckBlock, DeformConv2d

BLOCK = {"in_channels": 32, "out_channels": 32, "bottleneck_channels": 16, "norm": "FrozenBN"}


def deform_block(deform: dict, **options) -> DeformBottleneckBlock:
    return DeformBottleneckBlock(detectron2_resnet.BottleneckBlock(**options), **deform)


def randomise(module: nn.Module) -> nn.Module:
    """Set all parameters and statistics to random values, with offsets of about a pixel."""
    with torch.no_grad():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if name.endswith("num_batches_tracked"):
                continue
            value.normal_(0, 0.2)
            if name.endswith(("running_var", "norm.weight")):
                value.abs_().add_(0.5)
    return module


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def torchvision_block(block: DeformBottleneckBlock, x: Tensor) -> Tensor:
    """Compute the block with torchvision's deformable convolution."""
    conv = block.conv2
    out = block.conv1(x).relu()
    predicted = block.conv2_offset(out)
    offset, mask = predicted, None
    if block.deform_modulated:
        first, second, third = predicted.chunk(3, dim=1)
        offset, mask = torch.cat([first, second], dim=1), third.sigmoid()
    out = torchvision.ops.deform_conv2d(
        out, offset, conv.weight, None, conv.stride, conv.padding, conv.dilation, mask
    )
    out = block.conv3(conv.norm(out).relu())
    return (out + (block.shortcut(x) if block.shortcut is not None else x)).relu()


@pytest.mark.parametrize(
    ("modulated", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"stride": 2, "in_channels": 24}),
        (True, {"stride": 2, "in_channels": 24, "stride_in_1x1": True}),
        (True, {"dilation": 2, "num_groups": 4}),
        (True, {"deform_num_groups": 4}),
        (False, {"deform_num_groups": 2, "num_groups": 8}),
        (True, {"deform_num_groups": 8, "num_groups": 2, "dilation": 2}),
    ],
    ids=str,
)
def test_block_equals_torchvision(modulated: bool, options: dict) -> None:
    options = {**BLOCK, **options}
    deform = {"deform_modulated": modulated}
    deform["deform_num_groups"] = options.pop("deform_num_groups", 1)
    block = randomise(deform_block(deform, **options)).double()
    inputs = torch.randn(2, options["in_channels"], 9, 11, dtype=torch.float64)
    results = []
    for forward in (block, lambda x: torchvision_block(block, x)):
        x = inputs.clone().requires_grad_()
        out = forward(x)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        gradients = torch.autograd.grad(loss, [x, *block.parameters()])
        results.append([out, *gradients])
    assert results[0][0].count_nonzero() > 100
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 3), (6, 2), (2, 6), (6, 6)])
def test_deform_groups_of_the_convolution(groups: int, deform_groups: int) -> None:
    conv = randomise(DeformConv2d(12, 24, 3, padding=1, groups=groups, deform_groups=deform_groups))
    x = torch.randn(2, 12, 7, 6)
    offset = torch.randn(2, 18 * deform_groups, 7, 6)
    mask = torch.rand(2, 9 * deform_groups, 7, 6)
    expected = torchvision.ops.deform_conv2d(
        x, offset, conv.weight, conv.bias, padding=1, mask=mask
    )
    torch.testing.assert_close(conv(x, offset, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("norm", ["FrozenBN", "GN", ""])
def test_block_has_detectron2_names_and_starts_plain(modulated: bool, norm: str) -> None:
    options = {
        "in_channels": 64,
        "out_channels": 128,
        "bottleneck_channels": 32,
        "stride": 2,
        "num_groups": 4,
        "norm": norm,
    }
    deform = {"deform_modulated": modulated, "deform_num_groups": 2}
    ours = deform_block(deform, **options)
    theirs = detectron2_resnet.DeformBottleneckBlock(**options, **deform)
    assert shapes(ours) == shapes(theirs)
    plain = detectron2_resnet.BottleneckBlock(**options)
    missing = plain.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    if modulated:  # the sigmoid of zero halves what the norm, if any, sees
        plain.conv2.weight.data.mul_(0.5)
    x = torch.randn(2, 64, 8, 8)
    out = ours(x)
    torch.testing.assert_close(out, plain(x), rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert ours.conv2_offset.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_under_autocast(dtype: torch.dtype) -> None:
    block = randomise(deform_block({"deform_modulated": True}, **BLOCK))
    x = torch.randn(2, 32, 8, 8)
    exact = block(x)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    out.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters())
    assert torch.nn.functional.cosine_similarity(out.float().flatten(), exact.flatten(), 0) > 0.99


def config(**resnets) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def build(cfg: CfgNode, name: str) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = name
    return build_backbone(cfg)


R18 = {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}
SMALL = {"RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8, "STEM_OUT_CHANNELS": 16}
GROUPED = {"NUM_GROUPS": 4, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 32}


@pytest.mark.parametrize(
    "resnets",
    [
        R18,
        SMALL,
        {**SMALL, "DEPTH": 101, "STRIDE_IN_1X1": False},
        {**GROUPED, "RES5_DILATION": 2},
        {**SMALL, "NORM": "BN"},
    ],
    ids=str,
)
def test_without_deformation_equals_detectron2(resnets: dict) -> None:
    ours = build(config(**resnets), "build_resnet_deform_backbone")
    theirs = build(config(**resnets), "build_resnet_backbone")
    assert list(shapes(ours).items()) == list(shapes(theirs).items())
    assert ours.output_shape() == theirs.output_shape()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    trainable = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == trainable
    x = torch.randn(1, 3, 64, 96)
    for name, reference in theirs.eval()(x).items():
        assert torch.equal(ours.eval()(x)[name], reference)


@pytest.mark.parametrize(
    "resnets",
    [
        {"DEPTH": 50},
        {"DEPTH": 101, "DEFORM_MODULATED": True},
        {"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8, "DEFORM_MODULATED": True},
        {"DEPTH": 101, "NUM_GROUPS": 64, "WIDTH_PER_GROUP": 4, "DEFORM_MODULATED": True},
        {"DEPTH": 50, "DEFORM_NUM_GROUPS": 2, "RES5_DILATION": 2, "NORM": "GN"},
    ],
    ids=str,
)
def test_deformable_names_equal_detectron2(resnets: dict) -> None:
    """Names, shapes and strides of the full-size networks, on the meta device."""
    cfg = config(DEFORM_ON_PER_STAGE=[False, True, True, True], **resnets)
    with torch.device("meta"):
        ours = build(cfg, "build_resnet_deform_backbone")
        theirs = build(cfg, "build_resnet_backbone")
    assert shapes(ours) == shapes(theirs)
    assert ours.output_shape() == theirs.output_shape()
    trainable = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == trainable


def test_fpn_levels_and_gradients() -> None:
    cfg = config(**SMALL, DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    backbone = build(cfg, "build_resnet_deform_fpn_backbone")
    kinds = {
        name: {type(block) for block in getattr(backbone.bottom_up, name)}
        for name in ("res2", "res3", "res4", "res5")
    }
    plain, deform = {detectron2_resnet.BottleneckBlock}, {DeformBottleneckBlock}
    assert kinds == {"res2": plain, "res3": deform, "res4": deform, "res5": deform}
    features = backbone(torch.randn(2, 3, 64, 128))
    assert {name: tuple(level.shape) for name, level in features.items()} == {
        f"p{level}": (2, 16, 64 // 2**level, 128 // 2**level) for level in (2, 3, 4, 5, 6)
    }
    sum(level.square().mean() for level in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith(("bottom_up.stem", "bottom_up.res2"))  # FREEZE_AT is 2
        assert (parameter.grad is None) == frozen, name


def test_freezing_reaches_deformable_stages() -> None:
    cfg = config(**SMALL, DEFORM_ON_PER_STAGE=[True] * 4, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    network = build(cfg, "build_resnet_deform_backbone")
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == name.startswith(("res4", "res5")), name
    assert isinstance(network.res3[0].conv2.norm, FrozenBatchNorm2d)
    assert isinstance(network.res4[0].conv2.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("resnets", "key"),
    [
        ({**R18, "DEFORM_ON_PER_STAGE": [False, False, False, True]}, "DEFORM_ON_PER_STAGE"),
        ({"DEPTH": 18}, "RES2_OUT_CHANNELS"),
        ({**R18, "NUM_GROUPS": 2}, "NUM_GROUPS"),
        ({**R18, "RES5_DILATION": 2}, "RES5_DILATION"),
        ({"RES5_DILATION": 4}, "RES5_DILATION"),
        ({"DEPTH": 77}, "DEPTH"),
        ({"DEFORM_ON_PER_STAGE": [True]}, "DEFORM_ON_PER_STAGE"),
        ({"DEFORM_ON_PER_STAGE": [True] * 4, "DEFORM_NUM_GROUPS": 3}, "DEFORM_NUM_GROUPS"),
        (
            {"DEFORM_ON_PER_STAGE": [True] * 4, "DEFORM_NUM_GROUPS": 4, "NUM_GROUPS": 6},
            "DEFORM_NUM_GROUPS",
        ),
    ],
    ids=str,
)
def test_bad_configuration_is_one_line(resnets: dict, key: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=key) as error:
        build(config(**resnets), "build_resnet_deform_backbone")
    assert "\n" not in str(error.value)
