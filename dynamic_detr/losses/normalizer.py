"""By what the sums of a loss are divided, so that the gradient that DistributedDataParallel
averages is that of one process with the whole batch."""

import torch
from detectron2.utils import comm
from torch import Tensor

__all__ = ["mean_over_processes"]


def mean_over_processes(totals: Tensor) -> Tensor:
    """For each total max(sum over all processes, 1) / number of processes, so that no process
    divides by 0. All processes must call it."""
    world = comm.get_world_size()
    if world > 1:
        totals = totals.clone()
        torch.distributed.all_reduce(totals)
    return totals.clamp(min=1) / world
