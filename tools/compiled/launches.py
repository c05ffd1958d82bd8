"""Recording and compiling of kernel launches without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "record_launches"]

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages")
WARP = 32  # threads


@dataclass
class Launch:
    """One launch of a kernel.

    Args:
        kernel: the kernel.
        arguments: arguments by name; tensors may be fake.
        options: compiler options.
        grid: number of programs along each axis.
    """

    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the kernel, each counted once."""
        tensors = {id(t): t for t in self.arguments.values() if isinstance(t, Tensor)}
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())

    def compile(self, architecture: int) -> CompiledKernel:
        """Compile for compute capability ``architecture / 10``; 90 is that of the H100."""
        target = GPUTarget("cuda", architecture, WARP)
        return triton.compile(self._source(), target=target, options=self.options)

    def _source(self) -> ASTSource:
        """Return the source, specialised as in a launch: 1 and None are constants, multiples of 16
        are marked as divisible."""
        signature, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            place, value = (parameter.num,), self.arguments[parameter.name]
            if isinstance(value, tuple):
                signature[parameter.name] = tuple(_kind(item) for item in value)
                continue
            special = not parameter.do_not_specialize
            one = isinstance(value, int) and value == 1 and special
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name] = "constexpr"
                constants[place] = value
                continue
            signature[parameter.name] = _kind(value)
            divisible = isinstance(value, int) and value % 16 == 0 and special
            if isinstance(value, Tensor) or divisible:
                attributes[place] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def record_launches(run: Callable[[], object]) -> list[Launch]:
    """Return the launches of a function, which runs on fake tensors without memory."""
    launches = []

    def record(kernel: JITFunction, *args: object, grid: tuple, warmup: bool, **kwargs: object):
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        names = [parameter.name for parameter in kernel.params]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        launches.append(Launch(kernel, arguments, options, grid))

    launch, JITFunction.run = JITFunction.run, record
    try:
        with FakeTensorMode():
            run()
    finally:
        JITFunction.run = launch
    return launches


def _kind(value: object) -> str:
    """Return the type of an argument in Triton's notation."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel takes {value!r}")
