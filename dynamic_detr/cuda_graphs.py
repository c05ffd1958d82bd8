"""The whole network as one launch: CUDA graphs, captured once for each size of input.

At batch 1 a GPU is faster than the host can launch hundreds of small kernels. A graph launches
them all at once, on buffers of its own: inputs are copied in, predictions are copied out.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .structures import Prediction

__all__ = ["CapturedNetwork", "GraphCache", "capture_network"]

WARM_UP_RUNS = 3  # in which libraries choose algorithms, and kernels are compiled

Network = Callable[[Tensor, Tensor], list[Prediction]]


@dataclass
class CapturedNetwork:
    """A graph and the buffers that it reads and writes.

    Args:
        graph: of one run of the network.
        inputs: the buffers that it reads.
        outputs: predictions in the buffers that it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: list[Prediction]

    def __call__(self, *inputs: Tensor) -> list[Prediction]:
        """What the network says of these inputs, in memory of its own."""
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return [_copy(prediction) for prediction in self.outputs]


def _copy(prediction: Prediction) -> Prediction:
    tensors = {n: value for n, value in vars(prediction).items() if isinstance(value, Tensor)}
    return replace(prediction, **{name: tensor.clone() for name, tensor in tensors.items()})


def capture_network(network: Network, inputs: tuple[Tensor, ...], pool: object) -> CapturedNetwork:
    """Runs the network a few times, then records one run without executing it.

    Args:
        network: must not ask the host for a value of the device.
        inputs: examples on a CUDA device, which are copied.
        pool: handle of the memory that the graph shares with others that never run at its side.
    """
    device = inputs[0].device
    autocast = torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        # weights that were cast before the capture would be gone when the graph runs
        cache_enabled=False,
    )
    # buffers made in inference mode could not be written to outside of it
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device), autocast:
        buffers = tuple(tensor.clone() for tensor in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                network(*buffers)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that pin batches, may go on allocating meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = network(*buffers)
    return CapturedNetwork(graph, buffers, outputs)


class GraphCache:
    """A network that runs as a CUDA graph wherever it can, with the same results.

    There is one graph for each shape of inputs, dtype under autocast and choice of deterministic
    algorithms; those that were used last are kept. They share their memory, so that together they
    need little more than the largest. Graphs read the weights where they lie: a change in place
    is seen; if a weight is found to have moved or to be another, all graphs are captured anew. Who
    replaces a module calls `clear`.

    On the CPU, with gradients, and within a capture of the caller's own the network runs as it is;
    and, with one warning, from the first capture on that fails.

    Args:
        network: `(images, image_sizes) -> list[Prediction]`.
        module: whose parameters and buffers the network reads besides its inputs.
        size: the number of graphs that are kept, at least 1.
    """

    def __init__(self, network: Network, module: nn.Module, size: int) -> None:
        self.network = network
        self.module = module
        self.size = size
        self._failed = False
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs, which frees their memory."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._graphs: OrderedDict[tuple, CapturedNetwork] = OrderedDict()
        self._pool = None
        self._weights: list[tuple[dict[str, Tensor | None], str, int]] = []
        self._finished = None

    def __call__(self, *inputs: Tensor) -> list[Prediction]:
        """Arguments and result as those of the network."""
        if self._failed or not self._can_capture(inputs):
            return self.network(*inputs)
        with self._lock:
            captured = self._find(inputs)
            if captured is not None:
                return self._run(captured, inputs)
        return self.network(*inputs)

    @staticmethod
    def _can_capture(inputs: tuple[Tensor, ...]) -> bool:
        return (
            all(tensor.is_cuda for tensor in inputs)
            and not torch.is_grad_enabled()
            and not torch.cuda.is_current_stream_capturing()
        )

    @staticmethod
    def _key(inputs: tuple[Tensor, ...]) -> tuple:
        device = inputs[0].device
        autocast = torch.is_autocast_enabled(device.type)
        return (
            device,
            *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs),
            torch.get_autocast_dtype(device.type) if autocast else None,
            torch.are_deterministic_algorithms_enabled(),
        )

    def _find(self, inputs: tuple[Tensor, ...]) -> CapturedNetwork | None:
        """The graph for these inputs, captured now if there is none; None if that fails."""
        if any(_address(tensors, name) != address for tensors, name, address in self._weights):
            self._clear()
        key = self._key(inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if not self._graphs:
            self._weights = _addresses(self.module)
            self._pool = self._new_pool()
        try:
            self._graphs[key] = self._capture(inputs)
        except torch.OutOfMemoryError:  # this size is too large; others may not be
            self._clear()
            return None
        except RuntimeError as error:
            self._clear()
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"The network cannot be captured as a CUDA graph ({reason}); it runs without.",
                stacklevel=4,
            )
            return None
        # after the capture, which has waited for every run of what is given up here
        if len(self._graphs) > self.size:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def _capture(self, inputs: tuple[Tensor, ...]) -> CapturedNetwork:
        return capture_network(self.network, inputs, self._pool)

    def _run(self, captured: CapturedNetwork, inputs: tuple[Tensor, ...]) -> list[Prediction]:
        """Runs after whatever ran before in the same memory, be it on another stream."""
        stream = torch.cuda.current_stream(inputs[0].device)
        if self._finished is None:
            self._finished = torch.cuda.Event()
        else:
            stream.wait_event(self._finished)
        outputs = captured(*inputs)
        self._finished.record(stream)
        return outputs


def _addresses(module: nn.Module) -> list[tuple[dict[str, Tensor | None], str, int]]:
    """Where each parameter and buffer lies: the dictionary that holds it, its name, its address.

    They are looked up there before every run: to walk through all modules would take longer than
    to launch the graph.
    """
    return [
        (tensors, name, _address(tensors, name))
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name in tensors
    ]


def _address(tensors: dict[str, Tensor | None], name: str) -> int:
    tensor = tensors.get(name)
    return 0 if tensor is None else tensor.data_ptr()
