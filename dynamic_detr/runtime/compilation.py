"""The network through torch.compile, with one line where that does not work."""

from collections.abc import Callable

import torch

from ..errors import UserError, one_line

__all__ = ["CompilationError", "compile_network"]


class CompilationError(UserError):
    """The network was to be compiled, and cannot be."""


def compile_network(network: Callable, backend: str | Callable) -> Callable:
    """The same function, compiled when it is first called.

    After the first size of input it is compiled for any size, as far as the compiler can; after too
    many kinds of input it runs as it is.

    Args:
        network: of tensors.
        backend: as `torch.compile` takes it.

    Returns:
        A function that raises `CompilationError` where the compiler fails, as without a C++
        compiler.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import, and seldom needed

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
