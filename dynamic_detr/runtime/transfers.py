"""Moving small tensors between host and device without making either wait for the other.

An ordinary copy to or from a GPU makes the host wait until the device has done all that it was
told before. A copy from or to pinned memory is only one more thing in the device's queue.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["host_empty", "to_device", "to_host"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from the host to a GPU without waiting for the GPU.

    The tensor itself may be changed or freed as soon as the call returns, unless it is pinned.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The tensor on the host, and a function that waits until its values have arrived.

    The function may be called from any thread, any number of times. Work that the device is given
    after this call is not waited for.
    """
    if not tensor.is_cuda:
        return tensor.cpu(), lambda: None
    host = host_empty(tensor.device, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
    device = tensor.device
    arrived = torch.cuda.Event(blocking=True)  # the waiting thread sleeps instead of spinning
    arrived.record(torch.cuda.current_stream(device))

    def wait() -> None:
        with torch.cuda.device(device):  # a new thread would wake GPU 0
            arrived.synchronize()

    return host, wait


def host_empty(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the host, from which the device can copy by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
