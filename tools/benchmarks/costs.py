"""What a detector costs before anything is timed: parameters, and arithmetic by part."""

from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynamic_detr import SetDetector
from dynamic_detr.engine.setup import find_config, read_config

__all__ = ["config_costs", "count_gmac", "count_parameters"]

PARTS = ("backbone", "encoder", "decoder")


def config_costs(config_file: str, size: tuple[int, int]) -> tuple[float, dict[str, float]]:
    """`count_parameters` and `count_gmac` of a configuration's model, for one image.

    The detectors of this project are traced without memory or arithmetic; others, whose way
    depends on what they find, detect on the CPU.

    Args:
        config_file: a path, or a name of Detectron2's model zoo.
        size: (height, width) of the image, which is padded as the backbone asks.

    Raises:
        UserError: the configuration does not exist or cannot work.
    """
    cfg = read_config(find_config(config_file), [])
    traced = cfg.MODEL.META_ARCHITECTURE in ("SetDetector", "DynamicDETR")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "meta" if traced else "cpu"
    with torch.device(cfg.MODEL.DEVICE):
        model = build_model(cfg).eval()
    parameters = count_parameters(model)
    if traced:
        return parameters, _trace(model, size)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return parameters, count_gmac(model, lambda: model([{"image": image}]))


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


def _trace(model: SetDetector, size: tuple[int, int]) -> dict[str, float]:
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
        sizes = torch.empty(1, 2, dtype=torch.int64, device="cuda")
        return count_gmac(model, lambda: model._network(image, sizes))
