"""Small models and random pyramids for the tests of the detector and its parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dynamic_detr import Pyramid, add_dynamic_detr_config
from dynamic_detr.config import KEYS
from dynamic_detr.decoders import DynamicDecoder
from dynamic_detr.encoders import DynamicEncoder
from dynamic_detr.files.config_file import read_config
from dynamic_detr.losses import HungarianMatcher, SetCosts, SetCriterion

STRIDES = (4, 8, 16, 32, 64)
SMALLEST = {  # options of `small_config`
    "HIDDEN_DIM": 32,
    "DYNAMIC_DECODER__NUM_QUERIES": 4,
    "DYNAMIC_ENCODER__NUM_GROUPS": 8,
    "DYNAMIC_DECODER__NUM_STAGES": 1,
}


def small_config(**options: object) -> CfgNode:
    """Return the configuration of a small Dynamic DETR.

    It has a ResNet-18 with GroupNorm, 64 channels, 32 queries, one encoder block and two stages.

    Args:
        options: keys of `MODEL.SET_DETECTOR`, or of other nodes of `MODEL` with "__" for a dot:
            `CLASS_HEAD="softmax"`, `DYNAMIC_DECODER__NUM_STAGES=3`.
    """
    cfg = get_cfg()
    add_dynamic_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DynamicDETR"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "GN"  # a frozen norm over random weights diverges
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    detector = {"HIDDEN_DIM": 64, "NUM_CLASSES": 5, "DYNAMIC_ENCODER__NUM_BLOCKS": 1}
    decoder = {"NUM_QUERIES": 32, "NUM_STAGES": 2, "FFN_DIM": 128, "DYNAMIC_DIM": 16}
    decoder = {f"DYNAMIC_DECODER__{name}": value for name, value in decoder.items()}
    set_options(cfg.MODEL, {**detector, **decoder, **options})
    return cfg


def set_options(model: CfgNode, options: dict[str, object]) -> None:
    for name, value in options.items():
        *parents, key = name.split("__")
        target = model if parents and parents[0] in model else model.SET_DETECTOR
        for parent in parents:
            target = target[parent]
        assert key in target, name
        target[key] = value


def defaults(node: str) -> dict[str, object]:
    """Return the defaults of a configuration node, by the names of constructor arguments."""
    split = [key.name.rpartition(".") for key in KEYS]
    pairs = zip(split, KEYS, strict=True)
    return {name.lower(): key.default for (parent, _, name), key in pairs if parent == node}


def dynamic_encoder(channels: int, **options: object) -> DynamicEncoder:
    """Build an encoder with the default configuration, except for one block and four groups."""
    options = {"num_blocks": 1, "num_groups": 4, "checkpoint_blocks": False, **options}
    options = {"num_levels": None, **defaults("MODEL.DYNAMIC_ENCODER"), **options}
    return DynamicEncoder(channels, **options)


def dynamic_decoder(channels: int, num_classes: int, **options: object) -> DynamicDecoder:
    """Build a decoder with the default configuration."""
    options = {"class_head": "focal", "checkpoint_stages": False, **options}
    return DynamicDecoder(channels, num_classes, **{**defaults("MODEL.DYNAMIC_DECODER"), **options})


def set_costs(**options: object) -> SetCosts:
    """Build the costs with the default configuration."""
    losses = defaults("MODEL.SET_DETECTOR.LOSS")
    return SetCosts(**{"class_head": "focal", **losses, **options})


def set_criterion(**options: object) -> SetCriterion:
    costs = set_costs(**options)
    return SetCriterion(costs, HungarianMatcher(costs))


def small_model(**options: object) -> nn.Module:
    """Build the model of `small_config`; `FPN.OUT_CHANNELS` is `HIDDEN_DIM`."""
    cfg = small_config(**options)
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.SET_DETECTOR.HIDDEN_DIM
    return build_model(cfg)


def model_without_memory(config_file: str | Path) -> nn.Module:
    """Build the model of a configuration on the device "meta"."""
    cfg = read_config(str(config_file), [])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def training_input(
    height: int, width: int, boxes: Sequence[Sequence[float]] = (), classes: Sequence[int] = ()
) -> dict:
    """Return an image of noise with objects, in the format of Detectron2's mapper.

    Args:
        height, width: size of the image in pixels.
        boxes: corners x0, y0, x1, y1 in pixels.
        classes: class of each box.
    """
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {"image": random_image(height, width), "instances": instances}


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def numpy_weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def level_size(image_size: Sequence[int], stride: int) -> tuple[int, int]:
    """Return the true (height, width) of a level, rounded up."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def random_levels(
    image_size: Sequence[int],
    channels: int,
    strides: Sequence[int] = STRIDES,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Return random levels (C, H, W) of one unpadded image."""
    return [torch.randn(channels, *level_size(image_size, s), dtype=dtype) for s in strides]


def batch_pyramid(
    images: Sequence[Sequence[Tensor]],
    image_sizes: Sequence[Sequence[int]],
    padded_size: Sequence[int],
    strides: Sequence[int] = STRIDES,
    garbage: float = 0.0,
) -> Pyramid:
    """Pad and batch the levels of several images.

    Args:
        images: levels (C, H, W) of each image.
        image_sizes: true (height, width) of each image in pixels.
        padded_size: (height, width) of the batch in pixels.
        garbage: scale of the noise in the padding; infinity fills it with NaN.
    """
    features = []
    for level, stride in enumerate(strides):
        maps = [levels[level] for levels in images]
        shape = (len(maps), maps[0].shape[0], *level_size(padded_size, stride))
        noise = torch.full(shape, torch.nan) if garbage == float("inf") else torch.randn(shape)
        filled = noise.to(maps[0].dtype) * (garbage if garbage != float("inf") else 1.0)
        for image, feature in enumerate(maps):
            filled[image, :, : feature.shape[1], : feature.shape[2]] = feature
        features.append(filled.contiguous(memory_format=torch.channels_last))
    return Pyramid(features, tuple(strides), torch.tensor(image_sizes))


def shake(module: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, so that none keeps an initial value of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return module
