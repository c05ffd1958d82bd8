"""Records of each training batch, as a pure function of (seed, iteration).

Shuffled epochs form an endless stream of records; the index of a record in the stream is its
*position*. Batches are filled along the stream and returned in the order in which they become full.
With aspect-ratio grouping, one batch of wide and one of tall images is filled at a time. Only the
sizes in the records are needed, not the images.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["BatchSchedule", "aspect_ratio_groups", "repeat_factors"]

BLOCK = 4096  # least number of positions per draw, rounded up to whole epochs


class BatchSchedule:
    """Order of training.

    Args:
        groups: (N,) integers from 0, the group of each record; a batch has records of one group.
        batch_size: number of images in a batch, over all processes.
        seed: seed of the order.
        repeats: (N,) floats, mean number of occurrences of each record in an epoch; None for 1.

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
        self._position = 0  # position of its first record
        self._waiting = {int(group): nothing for group in np.unique(self.groups)}
        self._first = 0  # iteration of the first batch in _batches
        self._batches = nothing.reshape(0, self.batch_size, 2)

    def batch(self, iteration: int) -> list[tuple[int, int]]:
        """Return (position, index of the record) for each image of a batch.

        Iterations may be requested in any order; ascending order is fastest.
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
        """Yield the part of one process of every batch from iteration ``start`` on, endlessly."""
        share = self.batch_size // world_size
        iteration = start
        while True:
            yield self.batch(iteration)[rank * share : (rank + 1) * share]
            iteration += 1

    def _draw_block(self) -> np.ndarray:
        """Return the record indices of a block of shuffled epochs, (n,)."""
        rng = np.random.default_rng([self.seed, self._block])
        count = len(self.groups)
        if self.repeats is None:
            epochs = math.ceil(BLOCK / count)
            return rng.permuted(np.tile(np.arange(count), (epochs, 1)), axis=1).reshape(-1)
        epochs = math.ceil(BLOCK / self.repeats.sum())
        whole = np.floor(self.repeats)
        drawn = []
        for _ in range(epochs):
            # A fractional repeat occurs in that fraction of the epochs.
            times = whole + (rng.random(count) < self.repeats - whole)
            drawn.append(rng.permutation(np.repeat(np.arange(count), times.astype(np.int64))))
        return np.concatenate(drawn)

    def _next_batches(self) -> np.ndarray:
        """Return the batches that become full within the next block, (n, batch size, 2)."""
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
    """Return 0 for wide and 1 for tall or square images, from ``width`` and ``height``."""
    return np.array([0 if r["width"] > r["height"] else 1 for r in records], dtype=np.int64)


def repeat_factors(records: Sequence[dict], threshold: float, sqrt: bool = True) -> np.ndarray:
    """Return the repeat factor of each image for oversampling of rare classes (LVIS).

    The factor of a class in a fraction f of the images is max(1, sqrt(threshold / f)). The factor
    of an image is the largest one of its classes.

    Args:
        records: records in Detectron2's format.
        threshold: fraction of images below which a class is repeated.
        sqrt: whether to take the square root.

    Returns:
        (N,) float64, at least 1.
    """
    classes = [{a["category_id"] for a in record.get("annotations", ())} for record in records]
    counts = Counter(c for present in classes for c in present)
    ratio = {c: threshold * len(records) / count for c, count in counts.items()}
    factor = {c: max(1.0, math.sqrt(r) if sqrt else r) for c, r in ratio.items()}
    return np.array([max((factor[c] for c in present), default=1.0) for present in classes])
