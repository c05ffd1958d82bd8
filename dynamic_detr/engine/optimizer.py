"""The optimiser: AdamW or SGD over groups of parameters that share a learning rate and a decay.

Detectron2 builds SGD only. The groups are those of the DETR family: the pretrained backbone and
the layers that predict sampling offsets have their own multiple of the learning rate, and
normalisation layers and biases their own weight decay.
"""

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError

# Modules, by their own name, that predict where to sample: the dynamic encoder's `offset`
# convolutions, `sampling_offsets` and `reference_points` of deformable attention, and
# `conv2_offset` of a backbone's deformable convolution (Detectron2's name for it).
OFFSET_MODULES = ("offset", "sampling_offsets", "reference_points", "conv2_offset")


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: by its class's name, so that the project's own
    masked ones and Detectron2's count too."""
    return any("Norm" in cls.__name__ for cls in type(module).__mro__)


def learning_rate_factor(
    name: str, pretrained_prefix: str, backbone_multiplier: float, offsets_multiplier: float
) -> float:
    """The multiple of the base learning rate for the parameter called ``name``.

    Both multipliers apply to a backbone's own offset layers.
    """
    factor = backbone_multiplier if name.startswith(pretrained_prefix) else 1.0
    if any(part in OFFSET_MODULES for part in name.split(".")):
        factor *= offsets_multiplier
    return factor


def _named_trainable(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """(full name, own name, owner, parameter) of each trainable parameter, shared ones once."""
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
    """Gather a model's trainable parameters by learning rate and weight decay.

    Args:
        model: the model; a parameter that several modules share appears once.
        base_lr: learning rate of everything that no multiplier names.
        weight_decay: decay of everything that the next two do not name.
        weight_decay_norm: decay in normalisation layers; None for ``weight_decay``.
        weight_decay_bias: decay of parameters called ``bias``, those of normalisation layers too
            (as in Detectron2); None leaves them to the rules above.
        bias_lr_factor: multiple of the learning rate for parameters called ``bias``.
        backbone_multiplier: multiple for the pretrained backbone (what ``backbone.bottom_up``
            gives where there is one, else ``backbone``).
        offsets_multiplier: multiple for :data:`OFFSET_MODULES`.

    Returns:
        Parameter groups ``{"params", "lr", "weight_decay"}`` in the order in which they are met.
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
    """Build the optimiser that ``cfg.SOLVER`` describes, without gradient clipping.

    Clipping belongs to the training step, which must undo float16's loss scale first.

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
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)  # one pass over memory
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be 'ADAMW' or 'SGD'")
