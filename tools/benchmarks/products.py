"""Products of a network: convolutions, deformable convolutions and matrix products.

They are recorded while the network runs. The time of plain products of the same sizes is a lower
bound of the network's time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

__all__ = ["PlainProducts", "Product", "dtypes_of", "no_fast_attention", "record_products"]

COPIES = ("_to_copy", "copy_", "clone", "empty", "zeros", "detach")  # operators without arithmetic


@dataclass(frozen=True)
class Product:
    """One call of a product.

    Args:
        name: name of the operator, such as "convolution" or "bmm".
        arguments: its arguments, with shapes in place of tensors.
        dtype: dtype of its first tensor.
        flop: number of multiplications and additions.
    """

    name: str
    arguments: tuple
    dtype: torch.dtype
    flop: int


class _Recorder(TorchDispatchMode):
    """Collects products, and counts the elements that all operators write, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.products, self.written = True, [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        computed = isinstance(out, Tensor) and not func.is_view and not name.startswith(COPIES)
        if computed and out.is_floating_point():
            self.written[out.dtype] += out.numel()
        formula = flop_registry.get(func.overloadpacket)
        if formula:
            flop = formula(*args, **(kwargs or {}), out_val=out)
        elif name == "deform_conv2d":  # of torchvision: input, weight, ...
            flop = 2 * out.numel() * args[1][0].numel()
        else:
            return out
        if self.active:
            shapes = tree_map_only(Tensor, lambda tensor: tensor.shape, args)
            self.products.append(Product(name, tuple(shapes), args[0].dtype, flop))
        return out


@contextmanager
def no_fast_attention() -> Iterator[None]:
    """Disable PyTorch's fused attention, which the counters do not know, within this context."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def record_products(run: Callable[[], object], without: nn.Module | None = None) -> list[Product]:
    """Record the products of a function.

    Args:
        run: the function.
        without: module that it calls, whose products are left out.
    """
    recorder = _Recorder()

    def switch(active: bool) -> None:
        recorder.active = active

    handles = []
    if without is not None:
        handles.append(without.register_forward_pre_hook(lambda *_: switch(False)))
        handles.append(without.register_forward_hook(lambda *_: switch(True)))
    try:
        with torch.no_grad(), no_fast_attention(), recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.products


def dtypes_of(run: Callable[[], object]) -> str:
    """Return the dtypes of a function's arithmetic, such as "bfloat16 98 %, float32 2 %".

    The shares are those of the products' operations, or without products, of the elements that the
    operators write.
    """
    recorder = _Recorder()
    with no_fast_attention(), recorder:
        run()
    shares = Counter()
    for product in recorder.products:
        shares[product.dtype] += product.flop
    shares = shares or recorder.written
    parts = [(f"{dtype}".removeprefix("torch."), n / shares.total()) for dtype, n in shares.items()]
    parts = [part for part in sorted(parts, key=lambda part: -part[1]) if part[1] >= 0.005]
    if len(parts) == 1:
        return parts[0][0]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts)


class PlainProducts:
    """Independent plain products of the same sizes, on random tensors.

    A deformable convolution becomes a convolution, and attention two matrix products.

    Args:
        products: recorded products.
        dtype: dtype of all tensors.
        device: device of all tensors.

    Raises:
        ValueError: a product has no plain counterpart.
    """

    def __init__(self, products: list[Product], dtype: torch.dtype, device: str) -> None:
        self.options = {"dtype": dtype, "device": device}
        self.tensors: dict[tuple[int, ...], Tensor] = {}
        self.calls = [call for product in products for call in self._plain(product)]

    def forward(self) -> None:
        with torch.no_grad():
            for function, tensors in self.calls:
                function(*tensors)

    def forward_and_backward(self) -> None:
        for function, tensors in self.calls:
            out = function(*tensors)
            torch.autograd.grad(out, tensors, self._tensor(out.shape).detach())

    def _tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of a shape, made once; maps are channels-last."""
        shape = tuple(shape)
        if shape not in self.tensors:
            tensor = torch.randn(shape, **self.options)
            if len(shape) == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.tensors[shape] = tensor.requires_grad_()
        return self.tensors[shape]

    def _plain(
        self, product: Product
    ) -> Iterator[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        arguments = product.arguments
        shapes = [argument for argument in arguments if isinstance(argument, torch.Size)]
        if product.name == "convolution":
            pair = (self._tensor(shapes[0]), self._tensor(shapes[1]))
            yield lambda x, weight: torch.convolution(x, weight, None, *arguments[3:]), pair
        elif product.name == "deform_conv2d":
            input, _, _, weight, _, *geometry = arguments
            pair = (self._tensor(input), self._tensor(weight))
            yield lambda x, weight: F.conv2d(x, weight, None, *geometry), pair
        elif product.name in ("mm", "bmm", "addmm", "baddbmm"):
            yield torch.matmul, (self._tensor(shapes[-2]), self._tensor(shapes[-1]))
        elif product.name.startswith("_scaled_dot_product"):
            query, key, value = (self._tensor(shape) for shape in shapes[:3])
            weights = self._tensor((*query.shape[:-1], key.shape[-2]))
            yield lambda q, k: q @ k.transpose(-1, -2), (query, key)
            yield torch.matmul, (weights, value)
        else:
            raise ValueError(f"{product.name} has no plain counterpart")
