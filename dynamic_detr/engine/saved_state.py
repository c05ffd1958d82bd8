"""What a checkpoint holds of the trainer must look like what it replaces.

PyTorch's optimisers take over whatever they are given: a state of another shape ends in a
segmentation fault in the fused AdamW, one of another type in a traceback some steps later.
"""

from typing import Any

import torch
from torch import Tensor

# Tensors that each optimiser keeps for a parameter, of the parameter's shape.
_LIKE_PARAMETER = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
_OPTIONAL = ("grad_scaler", "hooks", "windows")  # the precision, or Detectron2, may have changed


def check_trainer_state(saved: Any, own: dict, optimizer: torch.optim.Optimizer) -> None:
    """Compare a saved state with the trainer's own.

    Args:
        saved: from a checkpoint.
        own: the trainer's state before it takes over the other.
        optimizer: of the trainer.

    Raises:
        ValueError: something is missing, or of another type or shape.
    """
    _check_like(saved, own, "trainer")
    _check_optimizer(saved["step"]["optimizer"], optimizer)


def _check_like(saved: Any, own: Any, name: str) -> None:
    """See that ``saved`` has the keys of ``own`` and values of the same types, at every depth."""
    if isinstance(own, dict):
        _require(isinstance(saved, dict), name, saved, "a dict")
        for key, value in own.items():
            if key in saved:
                _check_like(saved[key], value, f"{name}.{key}")
            elif key not in _OPTIONAL and not isinstance(value, bool | None):  # flags have defaults
                raise ValueError(f"{name}.{key} is missing")
    elif isinstance(own, list | tuple):
        _require(isinstance(saved, list | tuple), name, saved, "a list")
        for index, value in enumerate(saved if own else ()):
            _check_like(value, own[min(index, len(own) - 1)], f"{name}.{index}")
    elif isinstance(own, Tensor):
        like = isinstance(saved, Tensor) and saved.shape == own.shape
        _require(like, name, saved, f"a tensor of shape {tuple(own.shape)}")
    elif isinstance(own, float):
        number = isinstance(saved, int | float) and not isinstance(saved, bool)
        _require(number, name, saved, "a number")
    elif own is not None:
        _require(type(saved) is type(own), name, saved, f"of type {type(own).__name__}")
        if type(own) is int:
            _require(min(own, 0) <= saved < 2**63, name, saved, "a count")


def _require(condition: bool, name: str, saved: Any, wish: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {saved!r:.40}, not {wish}")


def _check_optimizer(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if saved_sizes != sizes:
        raise ValueError(
            f"its optimiser has other parameters: groups of {saved_sizes}, not {sizes}"
        )
    # The saved groups number the parameters in the same order.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(set(numbers)) != len(numbers):
        raise ValueError("its groups name a parameter twice")
    kind = type(optimizer).__name__
    for number, parameter in zip(numbers, parameters, strict=True):
        state = saved["state"].get(number, {})  # empty before the first gradient
        _require(isinstance(state, dict), f"state {number}", state, "a dict")
        for key in _LIKE_PARAMETER[kind] if state else ():
            value = state.get(key)
            if value is None and kind == "SGD":  # without momentum
                continue
            wish = f"a tensor of shape {tuple(parameter.shape)}"
            _require(_is_plain(value, parameter.shape), f"{key} {number}", value, wish)
        if state and kind == "AdamW":
            step = state.get("step")
            _require(_is_count(step), f"step {number}", step, "a number of steps")


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        return step.dim() == 0 and not step.is_meta and _is_count(step.item())
    return isinstance(step, int | float) and 0 <= step < 2**53


def _is_plain(value: Any, shape: torch.Size) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        and value.is_floating_point()
        and value.shape == shape
    )
