"""What a detector costs before anything is timed: parameters, and arithmetic by part."""

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

__all__ = ["config_costs", "config_products", "count_gmac", "count_parameters"]

PARTS = ("backbone", "encoder", "decoder")


def config_costs(config_file: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    """`count_parameters` and `count_gmac` of a configuration's model, for one image.

    The network is traced, without memory or arithmetic; what is counted of Faster R-CNN's second
    stage is its head on as many boxes as the first one proposes at most.

    Args:
        config_file: a path, or a name of Detectron2's model zoo.
        size: (height, width) of the image, which is padded as the backbone asks.

    Raises:
        UserError: the configuration does not exist or cannot work, or is of another detector.
    """
    return _costs(_read(config_file).MODEL.dump(), size)


def config_products(config_file: str, size: tuple[int, int], batch: int) -> list[Product]:
    """Those of a configuration's model for a batch of images, except for its backbone's.

    The arguments and errors are those of `config_costs`.
    """
    cfg = _read(config_file)
    with _traced(cfg) as model:
        image = _image(model, size, batch)
        return record_products(
            lambda: RUNS[cfg.MODEL.META_ARCHITECTURE](model, image, cfg), model.backbone
        )


def _read(config_file: str) -> CfgNode:
    cfg = read_config(find_config(config_file), [])
    if cfg.MODEL.META_ARCHITECTURE not in RUNS:
        raise UserError(f"MODEL.META_ARCHITECTURE is not one of {list(RUNS)} in {config_file}")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "meta"
    return cfg


@cache  # configurations that differ in their recipe share a model
def _costs(model_node: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    cfg = get_cfg()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    with _traced(cfg) as model:
        image = _image(model, size, 1)
        gmac = count_gmac(model, lambda: RUNS[cfg.MODEL.META_ARCHITECTURE](model, image, cfg))
    return count_parameters(model), gmac


@contextmanager
def _traced(cfg: CfgNode) -> Iterator[nn.Module]:
    """The model on fake tensors, within this context."""
    with torch.device("meta"):
        model = build_model(cfg).eval()
    with FakeTensorMode():  # as on a GPU, where the network looks at no value
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kind = {"dtype": tensor.dtype, "device": "cuda"}
                        tensors[name] = torch.empty(tensor.shape, **kind)
        yield model


def _image(model: nn.Module, size: tuple[int, int], batch: int) -> Tensor:
    """A batch of images, padded as the backbone asks."""
    multiple = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // multiple) * multiple for side in size)
    return torch.empty(batch, 3, height, width, device="cuda")


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
    """In millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def count_gmac(model: nn.Module, infer: Callable[[], object]) -> dict[str, float]:
    """Multiplications and additions in thousands of millions, by part, and of "all".

    Counted are products of matrices and convolutions, deformable ones too.

    Args:
        model: which can train no more afterwards.
        infer: runs it, in whole or from backbone to decoder.
    """
    model.requires_grad_(False)  # the counter would follow gradients, if there were any
    with no_fast_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        infer()
    counts = {name: sum(ops.values()) / 2e9 for name, ops in counter.get_flop_counts().items()}
    found = {}
    for part in PARTS:
        names = (f"{type(model).__name__}.{part}", type(getattr(model, part, None)).__name__)
        found[part] = next((counts[name] for name in names if name in counts), 0.0)
    return {**{part: value for part, value in found.items() if value}, "all": counts["Global"]}
