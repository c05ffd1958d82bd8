"""Choice between Triton kernels and plain PyTorch."""

import types
import warnings

import pytest
import torch

from dynamic_detr.ops import backend


def tensor(is_cuda: bool = True, dtype: torch.dtype = torch.float32) -> types.SimpleNamespace:
    return types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device=torch.device("cuda", 0))


@pytest.fixture
def working(monkeypatch):
    monkeypatch.delenv(backend.SWITCH, raising=False)
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)


def test_kernels_serve_on_a_gpu(working):
    assert backend.kernel_serves(tensor())
    assert backend.kernel_serves(tensor(dtype=torch.bfloat16))
    assert not backend.kernel_serves(tensor(dtype=torch.float64))
    assert not backend.kernel_serves(tensor(is_cuda=False))


def test_environment_disables_kernels(working, monkeypatch):
    monkeypatch.setenv(backend.SWITCH, "0")
    assert not backend.kernel_serves(tensor())


def test_broken_triton_warns_once(working, monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: "Triton is missing")
    backend._warn.cache_clear()
    with pytest.warns(UserWarning, match="^Triton is missing. Operators run in plain PyTorch"):
        assert not backend.kernel_serves(tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.kernel_serves(tensor())
    backend._warn.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU that was not tried before."""
    monkeypatch.setattr(backend, "_problems", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 2000")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return torch.device("cuda", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_problem_is_one_line(gpu):
    problem = backend.triton_problem(gpu)
    assert problem.startswith("Triton cannot") and "\n" not in problem


def test_old_gpus_are_not_tried(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.triton_problem(gpu) == "GPU 2000 is too old for the Triton kernels"


def test_nothing_is_tried_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backend, "_try", lambda device: pytest.fail("tried"))
    assert backend.triton_problem(gpu) is None
    monkeypatch.setitem(backend._problems, gpu, "known")
    assert backend.triton_problem(gpu) == "known"
