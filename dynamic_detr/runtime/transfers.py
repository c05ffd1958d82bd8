"""Copies of small tensors between host and device without synchronisation.

An ordinary copy to or from a GPU makes the host wait for all work in the stream. A copy from or to
pinned memory is only added to the stream.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["host_empty", "to_device", "to_host"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the host to a GPU without synchronisation.

    If the tensor is pinned, the caller must not change it before the copy is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start a copy to the host; return the copy and a function that waits for its values.

    The function may be called from any thread and repeatedly. It does not wait for later work of
    the device.
    """
    if not tensor.is_cuda:
        return tensor.cpu(), lambda: None
    host = host_empty(tensor.device, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
    device = tensor.device
    arrived = torch.cuda.Event(blocking=True)  # the waiting thread sleeps instead of spinning
    arrived.record(torch.cuda.current_stream(device))

    def wait() -> None:
        with torch.cuda.device(device):  # in a new thread the current device is GPU 0
            arrived.synchronize()

    return host, wait


def host_empty(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised host tensor, pinned if the device is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
