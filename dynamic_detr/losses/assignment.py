"""Assignment problems of least cost, solved by a few threads next to the one that trains.

The costs are awaited and the problems solved on these threads (SciPy's solver lets other Python
threads run), so that the training thread goes on giving work to the device until it needs the
answer.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..transfers import host_empty, to_device, to_host

__all__ = ["PendingAssignment"]

THREADS = min(4, os.cpu_count() or 1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="assignment")


if hasattr(os, "register_at_fork"):  # a forked process has the pool, but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


class PendingAssignment:
    """The best pairs of queries and objects of S stages and B images, being searched for.

    Args:
        costs: (T, S, Q) finite, of the T objects of all images, image by image.
        counts: objects T_b of each image; their sum is T.
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
        """The pairs, when they are found.

        Returns:
            rows, objects: (S, M) int64 on the device of the costs, M = Σ min(T_b, Q). A row is
            (stage · B + image) · Q + query, the place of the query in a table of all stages,
            images and queries; an object is counted over all images. Images in their order, the
            queries of each ascending.
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
    """Solves some of the problems and writes each answer to its own place in the index."""
    arrived()
    queries = costs.shape[2]
    for stage, image, objects, pairs in problems:
        row, column = linear_sum_assignment(costs[objects, stage].T)
        index[0, stage, pairs] = row + (stage * batch + image) * queries
        index[1, stage, pairs] = column + objects.start
