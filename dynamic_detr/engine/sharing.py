"""Results of process 0 for all processes; only its disk needs the files."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from ..errors import UserError, one_line

__all__ = ["from_main_process"]

T = TypeVar("T")


def from_main_process(make: Callable[[], T]) -> T:
    """Call a function in process 0 and send its result to all; every process calls this.

    Args:
        make: function that returns tensors, plain types, or dicts, lists and tuples of these.

    Returns:
        The result itself in process 0; in the others a copy with tensors on the CPU.

    Raises:
        UserError: in every process, if ``make`` raised it. If ``make`` raised another exception,
            process 0 raises that and the others a UserError.
    """
    if comm.get_world_size() == 1:
        return make()
    if comm.is_main_process():
        return _send(make)
    outcome: list[Any] = [None]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return _map_tensors(outcome[0], _receive)


def _send(make: Callable[[], T]) -> T:
    payloads: list[Tensor] = []

    def announce(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise UserError(
                f"a tensor of {tensor.layout} on {tensor.device} cannot be sent to other processes"
            )
        payloads.append(tensor.detach().contiguous())
        return torch.empty_like(tensor, device="meta")  # pickled as shape, dtype and strides only

    try:
        result = make()
        announced = _map_tensors(result, announce)
    except Exception as error:
        message = error if isinstance(error, UserError) else UserError(one_line(error))
        dist.broadcast_object_list([message])
        raise
    dist.broadcast_object_list([announced])
    for payload in payloads:
        _broadcast(payload)
    return result


def _receive(announced: Tensor) -> Tensor:
    received = _broadcast(torch.empty(announced.shape, dtype=announced.dtype))
    return torch.empty_like(announced, device="cpu").copy_(received)


def _broadcast(values: Tensor) -> Tensor:
    """Broadcast contiguous values from process 0, as bytes: backends support few dtypes."""
    if values.numel():
        payload = values.view(-1).view(torch.uint8)
        sent = payload.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(sent, 0)
        payload.copy_(sent)
    return values


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy nested dicts, lists and tuples, with ``function`` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
