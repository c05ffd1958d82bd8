"""Weights of Hugging Face's classes for DETR and Deformable DETR.

The module of each detector has `convert_huggingface(weights)` beside `convert`.
"""

from importlib import import_module

import torch
from torch import Tensor

__all__ = ["convert", "join_projections", "system_of"]


def join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join q_proj, k_proj and v_proj of each attention into PyTorch's in_proj."""
    joined = dict(weights)
    for name in weights:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in name and joined.keys() >= set(parts):
            rows = [joined.pop(part) for part in parts]
            joined[name.replace(".q_proj.", ".in_proj.")] = torch.cat(rows)
    return joined


def system_of(weights: dict[str, Tensor]) -> str:
    """Return "deformable-detr" if a layer has sampling offsets, else "detr"."""
    deformable = any("sampling_offsets" in name for name in weights)
    return "deformable-detr" if deformable else "detr"


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the class that they belong to."""
    module = import_module("conversions." + system_of(weights).replace("-", "_"))
    return module.convert_huggingface(weights)
