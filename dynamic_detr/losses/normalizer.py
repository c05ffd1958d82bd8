"""Divisors of loss sums in data-parallel training.

DistributedDataParallel averages gradients. With sums divided by their mean over the processes, the
averaged gradient equals the gradient of one process with the whole batch.
"""

import torch
from detectron2.utils import comm
from torch import Tensor

__all__ = ["mean_over_processes"]


def mean_over_processes(totals: Tensor) -> Tensor:
    """Return max(sum over all processes, 1) / number of processes, for each total.

    All processes must call this function. The maximum avoids a division by 0.
    """
    world = comm.get_world_size()
    if world > 1:
        totals = totals.clone()
        torch.distributed.all_reduce(totals)
    return totals.clamp(min=1) / world
