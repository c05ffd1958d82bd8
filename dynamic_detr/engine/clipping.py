"""Gradient clipping per parameter, as in Detectron2, or over the full model."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError

GradientClipper = Callable[[Sequence[nn.Parameter]], Tensor]


def gradient_norm(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all gradients, a scalar on their device; 0 without gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type)


def build_clipper(cfg: CfgNode) -> GradientClipper:
    """Build a function that clips gradients in place and returns their norm from before.

    The norm is over all gradients, and is finite if and only if all of them are. The function does
    not synchronise with the device; the caller checks the norm.

    Args:
        cfg: configuration; reads ``SOLVER.CLIP_GRADIENTS``: ``ENABLED``, ``CLIP_TYPE``
            ("full_model", "norm" or "value"), ``CLIP_VALUE`` and ``NORM_TYPE``.

    Raises:
        UserError: ``CLIP_TYPE`` is unknown or ``CLIP_VALUE`` is not positive.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return gradient_norm
    if not clip.CLIP_VALUE > 0:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE is {clip.CLIP_VALUE}; it must be positive "
            "(SOLVER.CLIP_GRADIENTS.ENABLED False turns clipping off)"
        )
    value, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE

    def clip_full_model(parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, value, norm_type)

    def clip_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
        total = gradient_norm(parameters, norm_type)
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_(parameter, value, norm_type)
        return total

    def clip_value(parameters: Sequence[nn.Parameter]) -> Tensor:
        total = gradient_norm(parameters, norm_type)
        torch.nn.utils.clip_grad_value_(parameters, value)
        return total

    clippers = {"full_model": clip_full_model, "norm": clip_norm, "value": clip_value}
    if clip.CLIP_TYPE not in clippers:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; it must be one of "
            + ", ".join(clippers)
        )
    return clippers[clip.CLIP_TYPE]
