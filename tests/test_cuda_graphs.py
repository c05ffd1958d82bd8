"""When the network is captured, which graphs are kept, and that nothing else changes.

Without a GPU, a graph is something that runs the network on its buffers when it is replayed.
"""

import copy
import warnings

import pytest
import torch
from helpers import SMALLEST, random_image, shake, small_model
from torch import Tensor, nn

from dynamic_detr import Prediction, detector
from dynamic_detr.runtime.cuda_graphs import CapturedNetwork, GraphCache


class FakeGraph:
    def __init__(self, network, inputs, outputs):
        self.network, self.inputs, self.outputs = network, inputs, outputs

    def replay(self) -> None:
        for buffer, new in zip(self.outputs, self.network(*self.inputs), strict=True):
            for name, tensor in vars(buffer).items():
                if isinstance(tensor, Tensor):
                    tensor.copy_(getattr(new, name))


class FakeCache(GraphCache):
    """Cache that counts captures; the next one raises `error`."""

    error: Exception | None = None

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.captures = 0

    @staticmethod
    def _can_capture(inputs):
        return not torch.is_grad_enabled()

    def _new_pool(self):
        return object()

    def _capture(self, inputs):
        if self.error is not None:
            raise self.error
        self.captures += 1
        buffers = tuple(torch.ones_like(tensor) for tensor in inputs)
        outputs = self.network(*buffers)
        return CapturedNetwork(FakeGraph(self.network, buffers, outputs), buffers, outputs)

    def _run(self, captured, inputs):
        return captured(*inputs)


class Network(nn.Module):
    """Module that scales its input and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.runs = 0

    def forward(self, images: Tensor, sizes: Tensor) -> list[Prediction]:
        self.runs += 1
        logits = images * self.weight
        boxes = images + sizes.sum()
        return [Prediction(logits, boxes, is_proposal=True, true_logits=images + 1)]


def cached(size: int = 2) -> tuple[Network, FakeCache]:
    network = Network()
    return network, FakeCache(network, network, size)


def inputs(height: int, value: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full((1, height, 4), value), torch.tensor([[height, 4]])


def assert_same(found: list[Prediction], wanted: list[Prediction]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.is_proposal == b.is_proposal
        torch.testing.assert_close(a.pred_logits, b.pred_logits, rtol=0, atol=0)
        torch.testing.assert_close(a.pred_boxes, b.pred_boxes, rtol=0, atol=0)
        torch.testing.assert_close(a.true_logits, b.true_logits, rtol=0, atol=0)


@torch.no_grad()
def test_says_what_the_network_says_in_memory_of_its_own():
    network, cache = cached()
    first = cache(*inputs(3, 1.0))
    second = cache(*inputs(3, 5.0))
    assert_same(first, network(*inputs(3, 1.0)))  # the second run has not written over it
    assert_same(second, network(*inputs(3, 5.0)))
    assert cache.captures == 1


@torch.no_grad()
def test_sizes_that_were_used_last_are_kept():
    _, cache = cached(size=2)
    for height, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (1, 4), (3, 5)):
        cache(*inputs(height))
        assert cache.captures == captures, height


@torch.no_grad()
def test_what_a_graph_depends_on():
    _, cache = cached(size=9)
    images, sizes = inputs(3)

    def captures_more(images=images) -> bool:
        before = cache.captures
        cache(images, sizes)
        return cache.captures > before

    assert captures_more()
    assert captures_more(images.double())
    assert captures_more(images.permute(0, 2, 1).contiguous().permute(0, 2, 1))  # another layout
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert captures_more()
            assert not captures_more()
    torch.use_deterministic_algorithms(True)
    try:
        assert captures_more()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not captures_more()


@torch.no_grad()
def test_weights_may_change_in_place_and_may_move():
    network, cache = cached()
    cache(*inputs(3))
    network.weight.mul_(3)
    assert_same(cache(*inputs(3)), network(*inputs(3)))
    assert cache.captures == 1
    average, network.weight.data = network.weight.data, torch.tensor(7.0)  # as an average does
    assert_same(cache(*inputs(3)), network(*inputs(3)))
    assert cache.captures == 2
    network.weight.data = average
    assert_same(cache(*inputs(3)), network(*inputs(3)))
    assert cache.captures == 3
    network.load_state_dict({"weight": torch.tensor(11.0)}, assign=True)
    assert_same(cache(*inputs(3)), network(*inputs(3)))
    assert cache.captures == 4


def test_gradients_need_the_network_itself():
    network, cache = cached()
    (prediction,) = cache(*inputs(3))
    assert prediction.pred_logits.requires_grad
    assert (cache.captures, network.runs) == (0, 1)


def test_the_cpu_has_no_graphs():
    network = Network()
    cache = GraphCache(network, network, 2)
    with torch.no_grad():
        assert_same(cache(*inputs(3)), network(*inputs(3)))


@torch.no_grad()
def test_what_cannot_be_captured_runs_without_and_says_so_once():
    network, cache = cached()
    cache(*inputs(3))
    cache.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    message = r"captured as a CUDA graph \(operation not permitted when stream is capturing\);"
    with pytest.warns(UserWarning, match=message):
        assert_same(cache(*inputs(2)), network(*inputs(2)))
    cache.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for height in (2, 3, 4):
            assert_same(cache(*inputs(height)), network(*inputs(height)))
    assert cache.captures == 1


class TestDetector:
    @pytest.fixture
    def model(self, monkeypatch):
        monkeypatch.setattr(detector, "GraphCache", FakeCache)
        model = shake(small_model(**SMALLEST), 0.01).eval()
        model.cuda_graphs = 2
        return model

    def test_results_are_the_same_and_training_frees_the_graphs(self, model):
        batch = [{"image": random_image(50, 64)}, {"image": random_image(64, 40)}]
        found = model(batch)
        cache = model._inference
        assert cache.captures == 1
        model([{"image": random_image(64, 64)}, {"image": random_image(33, 20)}])
        assert cache.captures == 1  # of the same padded size
        for output, wanted in zip(found, self.eager(model, batch), strict=True):
            for name, value in output["instances"].get_fields().items():
                expected = wanted["instances"].get(name)
                value, expected = (getattr(v, "tensor", v) for v in (value, expected))
                torch.testing.assert_close(value, expected)
        model.train().eval()(batch)
        assert cache.captures == 2

    @staticmethod
    def eager(model: nn.Module, batch: list[dict]) -> list[dict]:
        plain = copy.deepcopy(model)
        plain.cuda_graphs = 0
        return plain(batch)

    def test_a_copy_captures_for_itself(self, model):
        batch = [{"image": random_image(64, 64)}]
        (found,) = model.predict(batch)[1]
        other = shake(copy.deepcopy(model), 0.1)
        (moved,) = other.predict(batch)[1]
        assert not torch.equal(found.pred_boxes, moved.pred_boxes)
        assert other._inference is not model._inference
        (again,) = model.predict(batch)[1]
        torch.testing.assert_close(again.pred_boxes, found.pred_boxes)


def test_config_without_a_gpu_warns_and_does_nothing():
    message = (
        r"INFERENCE\.CUDA_GRAPHS is 3, but MODEL\.DEVICE is 'cpu': the network runs without\.$"
    )
    with pytest.warns(UserWarning, match=message):
        model = small_model(**SMALLEST, INFERENCE__CUDA_GRAPHS=3).eval()
    assert model.cuda_graphs == 3
    assert len(model([{"image": random_image(64, 64)}])) == 1


@pytest.mark.filterwarnings("ignore:.*CUDA_GRAPHS")
def test_a_negative_number_of_graphs_is_one_line():
    with pytest.raises(ValueError, match=r"^MODEL\.[\w.]*CUDA_GRAPHS is -1; it must be .* >= 0\.$"):
        small_model(**SMALLEST, INFERENCE__CUDA_GRAPHS=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_graphs_say_what_the_network_says(self, dtype):
        model = shake(small_model(), 0.01).eval().cuda()
        batches = [[{"image": random_image(*size)}] for size in ((64, 90), (64, 128), (100, 60))]

        def run() -> list[list[Prediction]]:
            with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                return [model.predict(batch)[1] for batch in batches]

        wanted = run()
        model.cuda_graphs, model._inference = 2, None
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the capture must not fail
            found = [run() for _ in range(2)]
        tolerance = 1e-4 if dtype is None else 3e-2
        for predictions in found:
            for a, b in zip(sum(predictions, []), sum(wanted, []), strict=True):
                torch.testing.assert_close(
                    a.pred_boxes, b.pred_boxes, rtol=tolerance, atol=tolerance
                )
                torch.testing.assert_close(
                    a.pred_logits, b.pred_logits, rtol=tolerance, atol=10 * tolerance
                )

    def test_the_host_does_not_wait_between_image_and_boxes(self):
        model = small_model().eval().cuda()
        batch = [{"image": random_image(64, 90)}]
        model(batch)  # what is set up once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.predict(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
