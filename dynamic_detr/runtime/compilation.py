"""The network through `torch.compile`, with a one-line error if compilation fails."""

from collections.abc import Callable

import torch

from ..errors import UserError, one_line

__all__ = ["CompilationError", "compile_network"]


class CompilationError(UserError):
    """The network cannot be compiled."""


def compile_network(network: Callable, backend: str | Callable) -> Callable:
    """Return a function that compiles the network at its first call.

    A second input size makes the compiler use dynamic shapes. After too many recompilations,
    `torch.compile` runs the network eagerly.

    Args:
        network: function of tensors.
        backend: backend of `torch.compile`.

    Returns:
        The function; it raises `CompilationError` if the compiler fails, for example without a C++
        compiler.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import and rarely needed

    compiled = torch.compile(network, backend=backend)

    def run(*inputs: object) -> object:
        try:
            return compiled(*inputs)
        except TorchDynamoException as error:
            raise CompilationError(
                f"MODEL.SET_DETECTOR.INFERENCE.COMPILE is True, but torch.compile fails here "
                f"({one_line(error)[:300]}); set it to False to run without."
            ) from error

    return run
