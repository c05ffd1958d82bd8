"""Parameters and arithmetic of a detector, counted without running it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamic_detr import SetDetector
from dynamic_detr.errors import UserError
from dynamic_detr.files.config_file import find_config, read_config

from .products import Product, no_fast_attention, record_products

__all__ = ["config_costs", "config_products", "count_gmac", "count_parameters", "padded_shape"]

PARTS = ("backbone", "encoder", "decoder")


def config_costs(config_file: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    """Return `count_parameters` and `count_gmac` of a configuration's model, for one image.

    The network is traced on fake tensors. The second stage of Faster R-CNN is counted for the
    largest number of proposals.

    Args:
        config_file: path, or name in Detectron2's model zoo.
        size: (height, width) of the image in pixels, before padding.

    Raises:
        UserError: the configuration does not exist or is invalid, or its meta-architecture is not
            one of `RUNS`.
    """
    return _costs(_read(config_file).MODEL.dump(), size)


def config_products(config_file: str, size: tuple[int, int], batch: int) -> list[Product]:
    """Return the products of a configuration's model, except those of its backbone.

    Args:
        config_file: path, or name in Detectron2's model zoo.
        size: (height, width) of the images in pixels, before padding.
        batch: number of images.

    Raises:
        UserError: as `config_costs`.
    """
    cfg = _read(config_file)
    with _traced(cfg) as model:
        image = torch.empty(padded_shape(model, size, batch), device="cuda")
        return record_products(
            lambda: RUNS[cfg.MODEL.META_ARCHITECTURE](model, image, cfg), model.backbone
        )


def _read(config_file: str) -> CfgNode:
    cfg = read_config(find_config(config_file), [])
    if cfg.MODEL.META_ARCHITECTURE not in RUNS:
        raise UserError(f"MODEL.META_ARCHITECTURE is not one of {list(RUNS)} in {config_file}")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "meta"
    return cfg


@cache  # configurations that differ only in the recipe have the same model
def _costs(model_node: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    cfg = get_cfg()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    with _traced(cfg) as model:
        image = torch.empty(padded_shape(model, size, 1), device="cuda")
        gmac = count_gmac(model, lambda: RUNS[cfg.MODEL.META_ARCHITECTURE](model, image, cfg))
    return count_parameters(model), gmac


@contextmanager
def _traced(cfg: CfgNode) -> Iterator[nn.Module]:
    """Build the model on fake tensors; yield it within their mode."""
    with torch.device("meta"):
        model = build_model(cfg).eval()
    with FakeTensorMode():  # on a GPU the network does not read any value
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kind = {"dtype": tensor.dtype, "device": "cuda"}
                        tensors[name] = torch.empty(tensor.shape, **kind)
        yield model


def padded_shape(model: nn.Module, size: tuple[int, int], batch: int) -> tuple[int, ...]:
    """Return (B, 3, H, W) of images that are padded to the size divisibility of the backbone."""
    multiple = max(model.backbone.size_divisibility, 1)
    return (batch, 3, *(-(-side // multiple) * multiple for side in size))


def _run_set_detector(model: SetDetector, image: Tensor, cfg: CfgNode) -> None:
    sizes = torch.empty(len(image), 2, dtype=torch.int64, device=image.device)
    model._network(image, sizes)


def _run_retinanet(model: nn.Module, image: Tensor, cfg: CfgNode) -> None:
    features = model.backbone(image)
    model.head([features[name] for name in model.head_in_features])


def _run_faster_rcnn(model: nn.Module, image: Tensor, cfg: CfgNode) -> None:
    features = model.backbone(image)
    model.proposal_generator.rpn_head([features[name] for name in cfg.MODEL.RPN.IN_FEATURES])
    side, boxes = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    regions = image.new_empty(len(image) * boxes, features["p2"].shape[1], side, side)
    model.roi_heads.box_predictor(model.roi_heads.box_head(regions))


RUNS = {
    "SetDetector": _run_set_detector,
    "DynamicDETR": _run_set_detector,
    "RetinaNet": _run_retinanet,
    "GeneralizedRCNN": _run_faster_rcnn,
}


def count_parameters(model: nn.Module) -> float:
    """Return the number of parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def count_gmac(model: nn.Module, infer: Callable[[], object]) -> dict[str, float]:
    """Count multiply-adds in units of 10⁹, by part and in total ("all").

    Matrix products and convolutions are counted, also deformable ones.

    Args:
        model: the detector; its parameters stay without gradients afterwards.
        infer: runs the detector, in whole or from backbone to decoder.
    """
    model.requires_grad_(False)  # else the counter follows gradients too
    with no_fast_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        infer()
    counts = {name: sum(ops.values()) / 2e9 for name, ops in counter.get_flop_counts().items()}
    found = {}
    for part in PARTS:
        names = (f"{type(model).__name__}.{part}", type(getattr(model, part, None)).__name__)
        found[part] = next((counts[name] for name in names if name in counts), 0.0)
    return {**{part: value for part, value in found.items() if value}, "all": counts["Global"]}
