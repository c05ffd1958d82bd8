"""Exponential moving average of the weights.

    average <- d * average + (1 - d) * weight,   d = min(DECAY, (1 + t) / (10 + t))

after step t. Because d starts small, the average forgets the random initial weights.
Floating-point buffers are averaged in the same way; integer buffers are copied.

``torch.optim.swa_utils.AveragedModel`` keeps a second module, averages integer buffers too, and
has no warm-up of d. Here the average is swapped into the model itself for evaluation, so CUDA
graphs, compilation and checkpoints see one module.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ModelEMA:
    """Moving average of a model's parameters and buffers.

    Args:
        model: the model in training, not its DistributedDataParallel wrapper.
        decay: DECAY above.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay is {decay}; it must be at least 0 and below 1")
        self.model = model
        self.decay = decay
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self.restart()

    def _tensors(self) -> dict[str, Tensor]:
        """Return parameters and saved buffers; shared ones appear under their first name only."""
        state = self.model.state_dict(keep_vars=True)
        first_names = {id(value): name for name, value in reversed(state.items())}
        return {name: state[name] for name in reversed(first_names.values())}

    @torch.no_grad()
    def restart(self) -> None:
        """Reset the average to the present weights."""
        self.updates = 0
        self._average = {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average; called after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged, current = [], []
        for name, value in self._tensors().items():
            if value.is_floating_point():
                averaged.append(self._average[name])
                current.append(value.detach())
            else:
                self._average[name].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the model within this context, without copying."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, value in self._tensors().items():
            value.data, self._average[name] = self._average[name], value.data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average under the names of the model's state dict, without copying."""
        with self.applied():
            return self.model.state_dict()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Load a saved average.

        Args:
            weights: result of :meth:`state_dict`; values of absent names stay unchanged.
            updates: number of updates of the saved average.
        """
        self.updates = updates
        for name, value in self._average.items():
            if name in weights:
                value.copy_(weights[name])
