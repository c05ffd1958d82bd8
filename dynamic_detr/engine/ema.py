"""Exponential moving average of the weights.

    average <- d * average + (1 - d) * weight,   d = min(DECAY, (1 + t) / (10 + t))

after the t-th step: the warm-up of d lets the average forget the random start. Running
statistics are averaged likewise; buffers of integers are copied.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ModelEMA:
    """A moving average of a model's state.

    Args:
        model: the model that is trained (not its DistributedDataParallel wrapper).
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
        """The model's own parameters and saved buffers, shared ones under their first name."""
        state = self.model.state_dict(keep_vars=True)
        first_names = {id(value): name for name, value in reversed(state.items())}
        return {name: state[name] for name in reversed(first_names.values())}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the model's present weights."""
        self.updates = 0
        self._average = {name: value.detach().clone() for name, value in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights, after the optimiser's step."""
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
        """Within this context the model holds the average; nothing is copied on the way."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, value in self._tensors().items():
            value.data, self._average[name] = self._average[name], value.data

    def state_dict(self) -> dict[str, Tensor]:
        """The average under the names of the model's own state, without a copy."""
        with self.applied():
            return self.model.state_dict()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take over a saved average.

        Args:
            weights: as :meth:`state_dict` gave them; names that are absent keep their value.
            updates: how many steps went into it.
        """
        self.updates = updates
        for name, value in self._average.items():
            if name in weights:
                value.copy_(weights[name])
