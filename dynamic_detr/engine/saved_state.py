"""The trainer's state in a checkpoint: checks before it is loaded, and windows of metrics.

PyTorch's optimisers load a state without checks. A tensor of another shape ends in a segmentation
fault in the fused AdamW, and one of another type in an error some steps later.
"""

from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..errors import UserError, one_line

__all__ = ["check_trainer_state", "fill_windows", "take_windows"]

# Tensors that each optimiser keeps for a parameter, of the parameter's shape.
_LIKE_PARAMETER = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
_OPTIONAL = ("grad_scaler", "hooks", "windows")  # the precision, or Detectron2, may have changed
_WINDOW = 20  # values that Detectron2's writers smooth
_TIMES = ("time", "data_time")


def check_trainer_state(
    saved: dict, own: dict, optimizer: torch.optim.Optimizer, max_iter: int
) -> None:
    """Check that a trainer can load a saved state.

    Args:
        saved: state from a checkpoint.
        own: present state of the trainer.
        optimizer: optimiser of the trainer.
        max_iter: ``SOLVER.MAX_ITER``.

    Raises:
        UserError: the state was saved with another optimiser or model, is damaged, or has more
            than ``max_iter`` iterations.
    """
    if saved.get("optimizer_name") != own["optimizer_name"]:
        raise UserError(
            f"the checkpoint's optimiser is {saved.get('optimizer_name')} and the configuration's "
            f"{own['optimizer_name']}; resume with the configuration of that run"
        )
    try:
        _check_like(saved, own, "trainer")
        _check_optimizer(saved["step"]["optimizer"], optimizer)
        _check_windows(saved.get("windows", {}))
    except ValueError as error:
        raise UserError(
            f"the checkpoint's trainer does not fit ({one_line(error)}); resume with the "
            "configuration of that run"
        ) from error
    done = saved["iteration"] + 1
    if done > max_iter:
        raise UserError(
            f"{done} iterations are done already and SOLVER.MAX_ITER is {max_iter}; raise it to go "
            "on, or evaluate with --eval-only --resume"
        )


def _check_like(saved: Any, own: Any, name: str) -> None:
    """Check that ``saved`` has the keys of ``own`` and values of the same types, at every depth."""
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


def _require(condition: bool, name: str, saved: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {saved!r:.40}, not {expected}")


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
            expected = f"a tensor of shape {tuple(parameter.shape)}"
            _require(_is_plain(value, parameter.shape), f"{key} {number}", value, expected)
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


def take_windows(storage: EventStorage) -> dict[str, Tensor]:
    """Return the last values of every smoothed metric.

    Detectron2's writers write the median of the last 20 values. With the windows restored, a
    resumed run writes the same medians as one that was never stopped. Times are left out, because
    they depend on the machine.

    Returns:
        For each metric an (N, 2) float64 tensor of value and iteration, N <= 20, oldest first.
    """
    hints = storage.smoothing_hints()
    return {
        name: torch.tensor(history.values()[-_WINDOW:], dtype=torch.float64)
        for name, history in storage.histories().items()
        if hints.get(name) and name not in _TIMES
    }


def _check_windows(windows: Any) -> None:
    if not isinstance(windows, dict):
        raise ValueError(f"its windows are {windows!r:.40}, not a dict")
    for name, window in windows.items():
        like = isinstance(window, Tensor) and window.dtype is torch.float64 and not window.is_meta
        if not isinstance(name, str) or not like or window.shape[1:] != (2,):
            raise ValueError(
                f"its window {name!r:.40} is {window!r:.40}, not values and iterations"
            )


def fill_windows(storage: EventStorage, windows: dict[str, Tensor]) -> None:
    """Restore the windows of :func:`take_windows`; the values are not written again."""
    for name, window in windows.items():
        for value, iteration in window.tolist():
            storage.histories()[name].update(value, int(iteration))
