"""Which records make up which batch: a pure function of (seed, iteration).

The records are drawn in an endless stream of shuffled epochs; a record's number in that stream is
its *position*. Batches are filled along the stream, with aspect-ratio grouping one for wide and
one for tall images at a time, and handed out as they fill up. All of it is decided from the sizes
in the records, before anything is loaded.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["BatchSchedule", "aspect_ratio_groups", "repeat_factors"]

BLOCK = 4096  # positions drawn at a time, at least; whole epochs


class BatchSchedule:
    """The order of training.

    Args:
        groups: group of every record, (N,) whole numbers from 0; a batch holds one group only.
        batch_size: images in a batch, over all processes.
        seed: of the order.
        repeats: how often each record occurs in an epoch on average, (N,) float; once when None.

    Raises:
        ValueError: there are no records, or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        seed: int,
        repeats: Sequence[float] | None = None,
    ) -> None:
        self.groups = np.asarray(groups, dtype=np.int64)
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.batch_size = batch_size
        self.seed = seed
        if len(self.groups) == 0 or batch_size < 1:
            raise ValueError(f"cannot make batches of {batch_size} from {len(groups)} records")
        self._restart()

    def _restart(self) -> None:
        nothing = np.empty((0, 2), dtype=np.int64)
        self._block = 0  # number of the next block to draw
        self._position = 0  # of its first record
        self._waiting = {int(group): nothing for group in np.unique(self.groups)}
        self._first = 0  # iteration of the first batch in _batches
        self._batches = nothing.reshape(0, self.batch_size, 2)

    def batch(self, iteration: int) -> list[tuple[int, int]]:
        """(position, index of the record) of every image of a batch.

        Any iteration may be asked for at any time; ascending ones are cheapest.
        """
        if iteration < 0:
            raise ValueError(f"iteration {iteration} is negative")
        if iteration < self._first:
            self._restart()
        while iteration >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._batches = self._next_batches()
        return [(int(p), int(index)) for p, index in self._batches[iteration - self._first]]

    def batches(
        self, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[tuple[int, int]]]:
        """One process's share of every batch from iteration ``start`` on, without end."""
        share = self.batch_size // world_size
        iteration = start
        while True:
            yield self.batch(iteration)[rank * share : (rank + 1) * share]
            iteration += 1

    def _draw_block(self) -> np.ndarray:
        """Indices of the records of some epochs, shuffled within each; (n,)."""
        rng = np.random.default_rng([self.seed, self._block])
        count = len(self.groups)
        if self.repeats is None:
            epochs = math.ceil(BLOCK / count)
            return rng.permuted(np.tile(np.arange(count), (epochs, 1)), axis=1).reshape(-1)
        epochs = math.ceil(BLOCK / self.repeats.sum())
        whole = np.floor(self.repeats)
        drawn = []
        for _ in range(epochs):
            # The fraction of a repeat happens in that fraction of the epochs.
            times = whole + (rng.random(count) < self.repeats - whole)
            drawn.append(rng.permutation(np.repeat(np.arange(count), times.astype(np.int64))))
        return np.concatenate(drawn)

    def _next_batches(self) -> np.ndarray:
        """Batches that fill up within the next block, in that order; (n, batch size, 2)."""
        indices = self._draw_block()
        positions = np.arange(self._position, self._position + len(indices))
        stream = np.stack([positions, indices], axis=1)
        self._block += 1
        self._position += len(indices)
        groups = self.groups[indices]
        full = []
        for group, waiting in self._waiting.items():
            items = np.concatenate([waiting, stream[groups == group]])
            end = len(items) - len(items) % self.batch_size
            full.append(items[:end].reshape(-1, self.batch_size, 2))
            self._waiting[group] = items[end:]
        batches = np.concatenate(full)
        return batches[np.argsort(batches[:, -1, 0])]


def aspect_ratio_groups(records: Sequence[dict]) -> np.ndarray:
    """0 for wide and 1 for tall (or square) images, by the records' ``width`` and ``height``."""
    return np.array([0 if r["width"] > r["height"] else 1 for r in records], dtype=np.int64)


def repeat_factors(records: Sequence[dict], threshold: float, sqrt: bool = True) -> np.ndarray:
    """How often to repeat each image so that rare classes are seen more often (LVIS).

    A class in a fraction f of the images gets max(1, sqrt(threshold / f)), an image the highest
    value of its classes.

    Args:
        records: in Detectron2's format.
        threshold: fraction of the images below which a class counts as rare.
        sqrt: whether to take the square root.

    Returns:
        (N,) float64, at least 1.
    """
    classes = [{a["category_id"] for a in record.get("annotations", ())} for record in records]
    counts = Counter(c for present in classes for c in present)
    ratio = {c: threshold * len(records) / count for c, count in counts.items()}
    factor = {c: max(1.0, math.sqrt(r) if sqrt else r) for c, r in ratio.items()}
    return np.array([max((factor[c] for c in present), default=1.0) for present in classes])
