"""Running statistics of batch norms, which change in the forward pass and differ by process."""

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """Running statistics of the batch norms of a model.

    Args:
        model: the model in training, not its DistributedDataParallel wrapper.
    """

    def __init__(self, model: nn.Module):
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._kept: list[Tensor] = []

    def _buffers(self) -> list[Tensor]:
        return [buffer for norm in self._norms for buffer in norm.buffers(recurse=False)]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the statistics."""
        self._kept = [buffer.clone() for buffer in self._buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Reset the statistics to the remembered ones, if there are any."""
        for buffer, kept in zip(self._buffers(), self._kept, strict=False):
            buffer.copy_(kept)

    def freeze(self) -> None:
        """Restore the statistics for good, while another thread may be in a forward pass."""
        for norm in self._norms:
            norm.eval()
        self.restore()

    def forget(self) -> None:
        """Accept the present statistics."""
        self._kept = []

    @torch.no_grad()
    def share(self) -> None:
        """Copy the statistics of process 0 to all processes, which all call this."""
        if comm.get_world_size() > 1:
            for buffer in self._buffers():
                dist.broadcast(buffer, src=0)
