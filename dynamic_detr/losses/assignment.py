"""Linear sum assignment on a few worker threads.

The workers wait for the costs and solve the problems. SciPy's solver releases the GIL, so the
training thread keeps launching work on the device until it needs the result.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..runtime.transfers import host_empty, to_device, to_host

__all__ = ["PendingAssignment"]

THREADS = min(4, os.cpu_count() or 1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="assignment")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool without its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


class PendingAssignment:
    """Assignment of queries to objects, in progress, for S stages and B images.

    Args:
        costs: (T, S, Q) finite costs of the T objects of all images, concatenated.
        counts: number of objects T_b of each image; the sum is T.
    """

    def __init__(self, costs: Tensor, counts: list[int]) -> None:
        _, stages, queries = costs.shape
        self._device = costs.device
        pairs = [min(count, queries) for count in counts]
        self._index = host_empty(costs.device, (2, stages, sum(pairs)), torch.int64)
        self._futures = []
        if not sum(pairs):
            return
        ends = zip(np.cumsum(counts), counts, np.cumsum(pairs), pairs, strict=True)
        spans = [(slice(t - n, t), slice(m - k, m)) for t, n, m, k in ends]
        problems = [
            (stage, image, *span)
            for stage in range(stages)
            for image, span in enumerate(spans)
            if counts[image]
        ]
        host, arrived = to_host(costs)
        solve = functools.partial(_solve, host.numpy(), arrived, self._index.numpy(), len(counts))
        self._futures = [
            _pool().submit(solve, problems[first::THREADS])
            for first in range(min(THREADS, len(problems)))
        ]

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait for the workers and return the pairs.

        Returns:
            rows: (S, M) int64 on the device of the costs, with M = Σ min(T_b, Q): the indices
            (stage · B + image) · Q + query. Pairs are sorted by image, then by query.
            objects: (S, M) int64, the indices in [0, T) of the matched objects.
        """
        for future in self._futures:
            future.result()
        rows, objects = to_device(self._index, self._device)
        return rows, objects


def _solve(
    costs: np.ndarray,
    arrived: Callable[[], None],
    index: np.ndarray,
    batch: int,
    problems: list[tuple[int, int, slice, slice]],
) -> None:
    """Solve some of the problems and write the pairs to their slices of the index."""
    arrived()
    queries = costs.shape[2]
    for stage, image, objects, pairs in problems:
        row, column = linear_sum_assignment(costs[objects, stage].T)
        index[0, stage, pairs] = row + (stage * batch + image) * queries
        index[1, stage, pairs] = column + objects.start
