"""Freezing of the backbone parameters that the used outputs do not depend on."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["freeze_unused"]

logger = logging.getLogger(__name__)


def freeze_unused(backbone: nn.Module, in_features: Sequence[str], channels: int = 3) -> None:
    """Freeze the parameters that get no gradient from the named outputs, in place.

    An FPN has convolutions for all its levels, also for those that the detector does not read.
    DistributedDataParallel would wait for their gradients.

    Args:
        backbone: a Detectron2 backbone.
        in_features: names of the outputs in use.
        channels: number of image channels.
    """
    if set(in_features) >= set(backbone.output_shape()):
        return
    named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    if not named:
        return
    side = 2 * max(64, backbone.size_divisibility)
    image = named[0][1].new_zeros(1, channels, side, side)
    training = backbone.training
    with torch.enable_grad():
        outputs = backbone.eval()(image)
        total = sum(outputs[name].sum() for name in in_features)
    backbone.train(training)
    grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    unused = [(n, p) for (n, p), grad in zip(named, grads, strict=True) if grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    if unused:
        logger.info(
            f"{list(in_features)} do not depend on {len(unused)} parameters of the backbone, which "
            f"are not trained: {', '.join(name for name, _ in unused)}"
        )
