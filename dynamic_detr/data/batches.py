"""Records of each training batch, as a pure function of (seed, iteration).

Shuffled epochs form an endless stream of records; the index of a record in the stream is its
*position*. Batches are filled along the stream and returned in the order in which they become full.
With aspect-ratio grouping, one batch of wide and one of tall images is filled at a time. Only the
sizes in the records are needed, not the images.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["BatchSchedule", "aspect_ratio_groups"]

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

    def batches(
        self, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield the part of one process of every batch from iteration ``start`` on, endlessly.

        A part is a list of (position, index of the record), one for each image.
        """
        share = self.batch_size // world_size
        for batch in itertools.islice(self._batches(), start, None):
            yield [(int(p), int(index)) for p, index in batch[rank * share : (rank + 1) * share]]

    def _draw_block(self, block: int) -> np.ndarray:
        """Return the record indices of a block of shuffled epochs, (n,)."""
        rng = np.random.default_rng([self.seed, block])
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

    def _batches(self) -> Iterator[np.ndarray]:
        """Yield all batches, (batch size, 2), in the order in which they become full."""
        first = 0  # position of the first record of the block
        waiting = {int(g): np.empty((0, 2), dtype=np.int64) for g in np.unique(self.groups)}
        for block in itertools.count():
            indices = self._draw_block(block)
            stream = np.stack([np.arange(first, first + len(indices)), indices], axis=1)
            first += len(indices)
            full = []
            for group, items in waiting.items():
                items = np.concatenate([items, stream[self.groups[indices] == group]])
                end = len(items) - len(items) % self.batch_size
                full.append(items[:end].reshape(-1, self.batch_size, 2))
                waiting[group] = items[end:]
            batches = np.concatenate(full)
            yield from batches[np.argsort(batches[:, -1, 0])]


def aspect_ratio_groups(records: Sequence[dict]) -> np.ndarray:
    """Return 0 for wide and 1 for tall or square images, from ``width`` and ``height``."""
    return np.array([0 if r["width"] > r["height"] else 1 for r in records], dtype=np.int64)
