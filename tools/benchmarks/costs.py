"""What a detector costs before anything is timed: parameters, and arithmetic by part."""

from collections.abc import Callable
from functools import cache

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamic_detr import SetDetector
from dynamic_detr.engine.setup import find_config, read_config
from dynamic_detr.errors import UserError

__all__ = ["config_costs", "count_gmac", "count_parameters"]

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
    cfg = read_config(find_config(config_file), [])
    if cfg.MODEL.META_ARCHITECTURE not in RUNS:
        raise UserError(f"MODEL.META_ARCHITECTURE is not one of {list(RUNS)} in {config_file}")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "meta"
    return _costs(cfg.MODEL.dump(), size)


@cache  # configurations that differ in their recipe share a model
def _costs(model_node: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    cfg = get_cfg()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    with torch.device("meta"):
        model = build_model(cfg).eval()
    multiple = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // multiple) * multiple for side in size)
    with FakeTensorMode():  # as on a GPU, where the network looks at no value
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kind = {"dtype": tensor.dtype, "device": "cuda"}
                        tensors[name] = torch.empty(tensor.shape, **kind)
        image = torch.empty(1, 3, height, width, device="cuda")
        gmac = count_gmac(model, lambda: RUNS[cfg.MODEL.META_ARCHITECTURE](model, image, cfg))
    return count_parameters(model), gmac


def _run_set_detector(model: SetDetector, image: Tensor, cfg: CfgNode) -> None:
    model._network(image, torch.empty(1, 2, dtype=torch.int64, device=image.device))


def _run_retinanet(model: nn.Module, image: Tensor, cfg: CfgNode) -> None:
    features = model.backbone(image)
    model.head([features[name] for name in model.head_in_features])


def _run_faster_rcnn(model: nn.Module, image: Tensor, cfg: CfgNode) -> None:
    features = model.backbone(image)
    model.proposal_generator.rpn_head([features[name] for name in cfg.MODEL.RPN.IN_FEATURES])
    side, boxes = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    regions = image.new_empty(boxes, features["p2"].shape[1], side, side)
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
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator is not known to the counter
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            infer()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    counts = {name: sum(ops.values()) / 2e9 for name, ops in counter.get_flop_counts().items()}
    found = {}
    for part in PARTS:
        names = (f"{type(model).__name__}.{part}", type(getattr(model, part, None)).__name__)
        found[part] = next((counts[name] for name in names if name in counts), 0.0)
    return {**{part: value for part, value in found.items() if value}, "all": counts["Global"]}
