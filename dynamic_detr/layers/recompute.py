"""Activation checkpointing of one layer of a stack."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["apply_layer"]


def apply_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Calls a layer.

    Args:
        layer: of a stack.
        inputs: its arguments.
        recompute: keep only the inputs, and compute the layer again in the backward pass.

    Returns:
        What the layer returns.
    """
    return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
