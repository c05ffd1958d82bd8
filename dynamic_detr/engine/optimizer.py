"""AdamW or SGD over parameter groups with their own learning rate and weight decay.

Detectron2 builds SGD only. As in the DETR family, the pretrained backbone and the layers that
predict sampling offsets have their own multiple of the learning rate, and normalisation layers and
biases their own weight decay.
"""

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError

# Names of modules of deformable attention that predict sampling locations (Deformable DETR, section
# 5). The offsets of deformable convolutions keep the rate of the other layers.
OFFSET_MODULES = ("sampling_offsets", "reference_points")


def is_normalisation(module: nn.Module) -> bool:
    """Return whether a class name of the module contains "Norm".

    This includes Detectron2's normalisation layers and the masked ones of this project.
    """
    return any("Norm" in cls.__name__ for cls in type(module).__mro__)


def learning_rate_factor(
    name: str, pretrained_prefix: str, backbone_multiplier: float, offsets_multiplier: float
) -> float:
    """Return the multiple of the base learning rate for a parameter."""
    factor = backbone_multiplier if name.startswith(pretrained_prefix) else 1.0
    if any(part in OFFSET_MODULES for part in name.split(".")):
        factor *= offsets_multiplier
    return factor


def _named_trainable(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Yield (full name, own name, module, parameter) of trainable parameters, shared ones once."""
    seen = set()
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{own_name}".lstrip("."), own_name, module, parameter


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
    backbone_multiplier: float = 1.0,
    offsets_multiplier: float = 1.0,
) -> list[dict]:
    """Group the trainable parameters of a model by learning rate and weight decay.

    Args:
        model: the model; shared parameters appear once.
        base_lr: learning rate before multipliers.
        weight_decay: default weight decay.
        weight_decay_norm: weight decay in normalisation layers; None for ``weight_decay``.
        weight_decay_bias: weight decay of parameters called ``bias``, including those of
            normalisation layers (as in Detectron2); None for the two rules above.
        bias_lr_factor: multiple of the learning rate for parameters called ``bias``.
        backbone_multiplier: multiple for the pretrained backbone, which is
            ``backbone.bottom_up`` if it exists, else ``backbone``.
        offsets_multiplier: multiple for :data:`OFFSET_MODULES`.

    Returns:
        Parameter groups ``{"params", "lr", "weight_decay"}`` in order of first occurrence.
    """
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", backbone)
    pretrained = next((f"{n}." for n, m in model.named_modules() if m is bottom_up), "backbone.")
    groups: dict[tuple[float, float], dict] = {}
    for name, own_name, module, parameter in _named_trainable(model):
        lr = base_lr * learning_rate_factor(
            name, pretrained, backbone_multiplier, offsets_multiplier
        )
        decay = weight_decay
        if weight_decay_norm is not None and is_normalisation(module):
            decay = weight_decay_norm
        if own_name == "bias":
            lr *= bias_lr_factor
            decay = decay if weight_decay_bias is None else weight_decay_bias
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of ``cfg.SOLVER``, without gradient clipping.

    The training step clips, because it must first undo the loss scale of float16.

    Raises:
        UserError: ``SOLVER.OPTIMIZER`` is unknown, or nothing in the model can be trained.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        offsets_multiplier=solver.OFFSETS_MULTIPLIER,
    )
    if not groups:
        raise UserError("the model has no trainable parameter; check MODEL.BACKBONE.FREEZE_AT")
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)  # one pass over the memory
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be 'ADAMW' or 'SGD'")
