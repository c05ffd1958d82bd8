"""The detector under torch.compile; and nothing between image and boxes makes the host wait for
the device."""

import pytest
import torch
from helpers import SMALLEST, random_image, shake, small_config, small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dynamic_detr import DynamicDETR
from dynamic_detr.runtime.compilation import CompilationError

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def test_detector_is_compiled_at_inference_only():
    model = shake(small_model(**SMALLEST, IN_FEATURES=["p4", "p5"]), 0.01).eval()
    batches = [[{"image": random_image(*size)}] for size in ((100, 128), (150, 250), (100, 190))]
    wanted = [model.predict(batch)[1][-1] for batch in batches]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_backend, model._inference = counter, None
    for batch, expected in zip(batches, wanted, strict=True):
        found = model.predict(batch)[1][-1]
        torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.pred_logits, expected.pred_logits, rtol=1e-3, atol=1e-4)
    frames = counter.frame_count
    assert 1 <= frames <= len(batches)
    model.train()._predict(batches[0])
    assert counter.frame_count == frames


def test_config_chooses_the_backend():
    assert DynamicDETR.from_config(small_config())["compile_backend"] is None
    cfg = small_config(INFERENCE__COMPILE=True)
    assert DynamicDETR.from_config(cfg)["compile_backend"] == "inductor"


def test_a_compiler_that_fails_is_one_line():
    def backend(graph, inputs):
        raise RuntimeError("no working C++ compiler\nfound")

    model = small_model(**SMALLEST, IN_FEATURES=["p5"]).eval()
    model.compile_backend = backend
    with pytest.raises(
        CompilationError, match=r"COMPILE is True, .* C\+\+ compiler found"
    ) as error:
        model.predict([{"image": random_image(64, 64)}])
    assert "\n" not in str(error.value)


class StaysOnTheDevice(TorchFunctionMode):
    """Refuses tensors on the host, and those that come to the device from there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            assert found.is_cuda, function
            assert function not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), args
        return found


def test_the_host_does_not_wait_within_the_network():
    """On a GPU that is feigned: whoever asks it for a value, fails."""
    model = small_model(**SMALLEST).eval()
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kind = {"dtype": tensor.dtype, "device": "cuda"}
                        tensors[name] = torch.empty(tensor.shape, **kind)
        images = torch.empty(2, 3, 64, 128, device="cuda")
        sizes = torch.empty(2, 2, dtype=torch.int64, device="cuda")
        with StaysOnTheDevice():
            (prediction,) = model._network(images, sizes)
    assert prediction.pred_boxes.shape == (2, 4, 4)
