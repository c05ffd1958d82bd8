"""Replay of a training step that names the first module with values that are not finite.

In the forward pass this is the first module that returns such values, or passes them to an inner
module; inner modules return first. In the backward pass it is the module whose autograd function
is the first to turn finite gradients into others.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Finding", "replay"]


@dataclass
class Finding:
    """Place of the first values that are not finite.

    Args:
        place: name and class of a module, or name of a weight or loss.
        what: which values are not finite there, in words.
    """

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor in nested containers and objects (Pyramid, Instances, Boxes)."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | str | bytes):
        seen.add(id(value))
        parts = value if isinstance(value, list | tuple | set) else ()
        if isinstance(value, dict):
            parts = value.values()
        elif hasattr(value, "__dict__"):
            parts = vars(value).values()
        for part in parts:
            yield from _tensors(part, seen)


def _count(value: Any) -> tuple[int, int]:
    """Return the number of floating-point values that are not finite, and of all."""
    tensors = [t.detach() for t in _tensors(value) if t.is_floating_point() and not t.is_meta]
    return sum(int((~t.isfinite()).sum()) for t in tensors), sum(t.numel() for t in tensors)


class _Watch:
    """Hooks on every module of a model for one forward pass.

    Attributes:
        finding: the first place of values that are not finite.
        owners: name of the module that created each node of the autograd graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.finding: Finding | None = None
        self.owners: dict[Any, str] = {}
        self._stack = ["the model"]
        self._names = {}
        for name, module in model.named_modules():
            kind = type(module).__name__
            self._names[module] = f"{name} ({kind})" if name else f"the model ({kind})"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        giver, name = self._stack[-1], self._names[module]
        self.own((args, kwargs), giver)
        self._stack.append(name)
        # Additive masks may be infinite.
        bad, numbers = _count((args, [v for key, v in kwargs.items() if "mask" not in key]))
        if bad and self.finding is None:
            self.finding = Finding(
                giver, f"{bad} of the {numbers} numbers that it passes to {name} are not finite"
            )

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        name = self._stack.pop()
        self.own(output, name)
        bad, numbers = _count(output)
        if (
            bad and self.finding is None and self._stack[1:]
        ):  # the output of the model is the losses
            self.finding = Finding(
                name,
                f"{bad} of the {numbers} numbers of its output are not finite; its input is finite",
            )

    def own(self, value: Any, name: str) -> None:
        """Record ``name`` as the creator of the graph of ``value``, except for recorded nodes."""
        todo = [tensor.grad_fn for tensor in _tensors(value) if tensor.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node not in self.owners:
                self.owners[node] = name
                todo += [following for following, _ in node.next_functions if following is not None]


def _watch_backward(watch: _Watch) -> list[Finding]:
    """Hook every node of the graph; ``backward`` then appends to the returned list."""
    findings: list[Finding] = []

    def hook(node: Any, owner: str):
        def check(returned: tuple, given: tuple) -> None:
            bad, numbers = _count(returned)
            if bad and not _count(given)[0]:
                findings.append(
                    Finding(
                        owner,
                        f"{bad} of the {numbers} numbers that {node.name()} returns are not "
                        "finite; the gradient that it received is",
                    )
                )

        return check

    for node, owner in watch.owners.items():
        node.register_hook(hook(node, owner))
    return findings


def replay(
    model: nn.Module, batch: list[dict], dtype: torch.dtype | None = None, scale: float = 1.0
) -> Finding | None:
    """Run the forward and backward pass of one step, without updating the weights.

    The caller sets the random seed of the step.

    Args:
        model: model in training mode, with the weights from before the step.
        batch: batch of the step.
        dtype: dtype of mixed precision, or None.
        scale: factor of the loss.

    Returns:
        The first place of values that are not finite; None if there is none.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and _count(value)[0]:
            return Finding(name, "the weight is not finite already before the step")
    watch = _Watch(model)
    device = next(model.parameters()).device.type
    with watch.watching(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        losses = model(batch)
    losses = {"loss": losses} if isinstance(losses, Tensor) else losses
    if watch.finding is not None:
        return watch.finding
    for name, value in losses.items():
        if _count(value)[0]:
            return Finding(name, "the loss is not finite, and every module's output is")
    total = sum(losses.values()) * scale
    watch.own(total, "the sum of the losses")
    findings = _watch_backward(watch)
    model.zero_grad(set_to_none=True)
    total.backward()
    if findings:
        return findings[0]
    gradients = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    norm = sum(float(gradient.float().square().sum()) for gradient in gradients.values()) ** 0.5
    if norm == float("inf"):
        name, largest = max(gradients.items(), key=lambda item: float(item[1].abs().max()))
        return Finding(name, f"the gradient is too large for a norm: {largest.abs().max():.3g}")
    return None
