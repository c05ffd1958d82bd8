"""Which implementation of an operator runs."""

import types
import warnings

import pytest
import torch

from dynamic_detr.ops import backend


def tensor(is_cuda: bool = True, dtype: torch.dtype = torch.float32) -> types.SimpleNamespace:
    return types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype)


@pytest.fixture
def working(monkeypatch):
    monkeypatch.delenv(backend.SWITCH, raising=False)
    monkeypatch.setattr(backend, "triton_problem", lambda: None)


def test_kernels_serve_on_a_gpu(working):
    assert backend.kernel_serves(tensor())
    assert backend.kernel_serves(tensor(dtype=torch.bfloat16))
    assert not backend.kernel_serves(tensor(dtype=torch.float64))
    assert not backend.kernel_serves(tensor(is_cuda=False))


def test_they_can_be_switched_off(working, monkeypatch):
    monkeypatch.setenv(backend.SWITCH, "0")
    assert not backend.kernel_serves(tensor())


def test_where_triton_does_not_work_one_warning_says_why(working, monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda: "Triton is away")
    backend._warn.cache_clear()
    with pytest.warns(UserWarning, match="^Triton is away. Operators run on PyTorch's own gather"):
        assert not backend.kernel_serves(tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.kernel_serves(tensor())
    backend._warn.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_problem_is_one_line(monkeypatch):
    backend.triton_problem.cache_clear()
    problem = backend.triton_problem()
    backend.triton_problem.cache_clear()
    assert problem.startswith("Triton cannot") and "\n" not in problem
