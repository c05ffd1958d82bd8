"""Hugging Face's classes for DETR and Deformable DETR, told apart by their names.

Each system's own module has `convert_huggingface(weights)`, as `convert`, for them.
"""

from importlib import import_module

from torch import Tensor

__all__ = ["convert", "system_of"]


def system_of(weights: dict[str, Tensor]) -> str:
    """The system: "deformable-detr" where a layer samples, otherwise "detr"."""
    deformable = any("sampling_offsets" in name for name in weights)
    return "deformable-detr" if deformable else "detr"


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    module = import_module("conversions." + system_of(weights).replace("-", "_"))
    return module.convert_huggingface(weights)
