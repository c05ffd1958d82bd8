"""Activation checkpointing of one layer of a stack."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["apply_layer"]


def apply_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Call a layer with its inputs.

    Args:
        layer: layer of a stack.
        inputs: positional arguments of the layer.
        recompute: keep only the inputs, and recompute the layer in the backward pass.

    Returns:
        The output of the layer.
    """
    return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
