"""Helpers of the operators' tests: kernels without a GPU, gradients, comparison with float64."""

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor


def use_kernels(patch: pytest.MonkeyPatch, module: ModuleType) -> str:
    """Return the device where the operator of a module runs its kernels: the GPU, or the CPU, where
    they are interpreted."""
    if torch.cuda.is_available():
        patch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
        return "cuda"
    patch.setattr(module, "kernel_serves", lambda t: t.dtype != torch.float64)
    return "cpu"


def gradients(out: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients of the tensors, without None, for a fixed upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, [t for t in tensors if t is not None], upstream))


def check_float64(
    run: Callable[..., Tensor], tensors: Sequence[Tensor | None], device: str, tolerance: float
) -> None:
    """Compare output and gradients on a device with those in float64 on the CPU.

    Args:
        run: the operator; float64 tensors on the CPU select the plain path.
        tensors: its differentiable arguments.
        device: where to run them.
        tolerance: relative to the largest value, or to 1 if that is smaller.
    """
    exact = [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]
    here = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
    expected, out = run(*exact), run(*here)
    assert out.stride() == expected.stride()
    found = [out, *gradients(out, here)]
    assert [t.dtype for t in found] == [t.dtype for t in (tensors[0], *here) if t is not None]
    for value, right in zip(found, [expected, *gradients(expected, exact)], strict=True):
        assert value.shape == right.shape
        assert value.isfinite().all()
        if value.numel():
            error = (value.double().cpu() - right).abs().max()
            assert error <= tolerance * right.abs().max().clamp(min=1)


def runs_plain_backward(
    patch: pytest.MonkeyPatch, plain: ModuleType, run: Callable[[], Tensor]
) -> bool:
    """Return whether `run`, with deterministic algorithms, has a plain backward pass."""
    called = []
    backward = plain.backward
    patch.setattr(plain, "backward", lambda *a: called.append(1) or backward(*a))
    torch.use_deterministic_algorithms(True)
    try:
        run().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return bool(called)
