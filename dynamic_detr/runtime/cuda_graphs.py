"""CUDA graphs of the whole network, one per input size.

With small batches, launching the kernels takes longer than running them. A graph launches all of
them at once. It has static buffers: inputs are copied in, predictions are copied out.

`torch.cuda.make_graphed_callables` needs tensors as outputs, and its capture fails if another
thread allocates memory.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..structures import Prediction

__all__ = ["CapturedNetwork", "GraphCache", "capture_network"]

WARM_UP_RUNS = 3  # libraries select algorithms, and kernels are compiled

Network = Callable[[Tensor, Tensor], list[Prediction]]


@dataclass
class CapturedNetwork:
    """CUDA graph with its static buffers.

    Args:
        graph: graph of one run of the network.
        inputs: static input buffers.
        outputs: predictions in static output buffers.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: list[Prediction]

    def __call__(self, *inputs: Tensor) -> list[Prediction]:
        """Return the predictions of the network for these inputs, as copies."""
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return [_copy(prediction) for prediction in self.outputs]


def _copy(prediction: Prediction) -> Prediction:
    tensors = {n: value for n, value in vars(prediction).items() if isinstance(value, Tensor)}
    return replace(prediction, **{name: tensor.clone() for name, tensor in tensors.items()})


def capture_network(network: Network, inputs: tuple[Tensor, ...], pool: object) -> CapturedNetwork:
    """Warm the network up and capture one run.

    Args:
        network: must not synchronise the host with the device.
        inputs: example tensors on a CUDA device; they are copied.
        pool: handle of the memory pool, shared by graphs that never run concurrently.
    """
    device = inputs[0].device
    autocast = torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        # a graph must not read cached casts of the weights, which are freed after the capture
        cache_enabled=False,
    )
    # tensors made in inference mode cannot be written outside of it
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device), autocast:
        buffers = tuple(tensor.clone() for tensor in inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                network(*buffers)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that pin batches, may allocate during the capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = network(*buffers)
    return CapturedNetwork(graph, buffers, outputs)


class GraphCache:
    """Least-recently-used cache of CUDA graphs of a network.

    The key is the shape, stride and dtype of the inputs, the autocast dtype and the choice of
    deterministic algorithms. All graphs share one memory pool, so together they need little more
    memory than the largest. A graph reads weights by address: changes in place take effect, and a
    weight that moved invalidates all graphs. Call `clear` after replacing a module.

    The network runs without graphs on the CPU, with gradients enabled, and during another capture.
    If a capture fails, it runs without graphs from then on, after one warning.

    Args:
        network: `(images, image_sizes) -> list[Prediction]`.
        module: module with all parameters and buffers that the network reads.
        size: largest number of graphs, at least 1.
    """

    def __init__(self, network: Network, module: nn.Module, size: int) -> None:
        self.network = network
        self.module = module
        self.size = size
        self._failed = False
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Delete all graphs and free their memory."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._graphs: OrderedDict[tuple, CapturedNetwork] = OrderedDict()
        self._pool = None
        self._weights: list[tuple[dict[str, Tensor | None], str, int]] = []
        self._finished = None

    def __call__(self, *inputs: Tensor) -> list[Prediction]:
        """Call the network; arguments and result are the network's."""
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
        """Return the graph for these inputs, captured if needed; None if the capture fails."""
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
        except torch.OutOfMemoryError:  # smaller inputs may still fit
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
        # after the capture, which synchronised with all runs of the evicted graph
        if len(self._graphs) > self.size:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _new_pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def _capture(self, inputs: tuple[Tensor, ...]) -> CapturedNetwork:
        return capture_network(self.network, inputs, self._pool)

    def _run(self, captured: CapturedNetwork, inputs: tuple[Tensor, ...]) -> list[Prediction]:
        """Run after the previous graph, which has the same memory, even on another stream."""
        stream = torch.cuda.current_stream(inputs[0].device)
        if self._finished is None:
            self._finished = torch.cuda.Event()
        else:
            stream.wait_event(self._finished)
        outputs = captured(*inputs)
        self._finished.record(stream)
        return outputs


def _addresses(module: nn.Module) -> list[tuple[dict[str, Tensor | None], str, int]]:
    """Return the dictionary, name and address of each parameter and buffer.

    Looking them up in the dictionaries before each run is faster than iterating over all modules,
    which takes longer than launching the graph.
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
