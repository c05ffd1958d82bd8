"""Multi-scale deformable attention in plain PyTorch: a gather, chunk by chunk, from a table with
one row for each position and head."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .bilinear import BilinearSamples
from .gather import add_table_gradient, rows_of, weight_gradient, weighted_gather

__all__ = ["backward", "forward"]

CHUNK = 1 << 21  # rows gathered at a time, which bounds the memory of indices and weights


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Tensor:
    """Compute `dynamic_detr.ops.ms_deform_attn` without autograd.

    `shapes` holds H and W of each level: [H_0, W_0, H_1, W_1, ...].
    """
    out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    table = _table(value.detach())
    for image, queries in _chunks(locations):
        samples = _Samples(locations[image, queries], weights[image, queries], shapes)
        pooled = weighted_gather(table[image], samples.index, samples.weight)
        part = out[image, queries]
        part.copy_(pooled.view_as(part))
    return out


def backward(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[int],
    needs_value: bool,
    needs_sampling: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of value, locations and weights; None for those not needed."""
    table = _table(value.detach())
    grad_table = torch.zeros_like(table) if needs_value else None
    grad_locations = locations.new_empty(locations.shape) if needs_sampling else None
    grad_weights = weights.new_empty(weights.shape) if needs_sampling else None
    for image, queries in _chunks(locations):
        samples = _Samples(locations[image, queries], weights[image, queries], shapes)
        grad_pooled = grad_out[image, queries].reshape(-1, value.shape[3])
        if needs_value:
            add_table_gradient(grad_table[image], grad_pooled, samples.index, samples.weight)
        if needs_sampling:
            grad = weight_gradient(grad_pooled, table[image], samples.index)
            samples.write_gradients(
                grad, grad_locations[image, queries], grad_weights[image, queries]
            )
    grad_value = grad_table.view(value.shape).to(value.dtype) if needs_value else None
    return grad_value, grad_locations, grad_weights


def _table(value: Tensor) -> Tensor:
    """Return one row for each position and head: (B, ΣHW·heads, d), float32 or wider."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return wide.contiguous().flatten(1, 2)


def _chunks(locations: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield an image and a range of its queries that gather about CHUNK rows."""
    batch, queries, heads, levels, points, _ = locations.shape
    step = max(1, CHUNK // (heads * levels * points * 4))
    for image in range(batch):
        for first in range(0, queries, step):
            yield image, slice(first, min(first + step, queries))


class _Samples:
    """Samples of n queries in the table of one image: `index` and `weight`, (n·heads, L·P·4).

    Args:
        locations: (n, heads, L, P, 2).
        weights: (n, heads, L, P).
        shapes: H and W of each level: [H_0, W_0, H_1, W_1, ...].
    """

    def __init__(self, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> None:
        heads, device = locations.shape[1], locations.device
        dtype = torch.promote_types(locations.dtype, torch.float32)
        locations, attention = locations.to(dtype), weights.to(dtype)
        levels, points = locations.shape[2:4]
        first_rows = [rows_of(shapes[: 2 * level]) for level in range(levels)]
        self.height, self.width, first_row = (
            _grid(numbers, points, device) for numbers in (shapes[::2], shapes[1::2], first_rows)
        )
        self.bilinear = BilinearSamples(
            locations[..., 1] * self.height - 0.5,
            locations[..., 0] * self.width - 0.5,
            self.height,
            self.width,
            attention,
        )  # (n, heads, L, P)
        head = torch.arange(heads, device=device, dtype=torch.int32)[:, None, None, None]
        index = self.bilinear.index(self.width).add_(first_row[..., None])
        self.index = index.mul_(heads).add_(head).flatten(2).flatten(0, 1)
        self.weight = self.bilinear.weight().flatten(2).flatten(0, 1)

    def write_gradients(self, grad: Tensor, grad_locations: Tensor, grad_weights: Tensor) -> None:
        """Write the gradients of locations and attention weights from the gradient of `weight`."""
        grad_y, grad_x, grad_attention = self.bilinear.backward(grad.view(*self.bilinear.shape, 4))
        grad_locations[..., 0], grad_locations[..., 1] = grad_x * self.width, grad_y * self.height
        grad_weights.copy_(grad_attention)


def _grid(numbers: Sequence[int], points: int, device: torch.device) -> Tensor:
    """Return (L, P) int32, filled on the device, as a copy from the host would synchronise. It is
    not (L, 1), as operations that broadcast along P are slow."""
    of_levels = [torch.full((1, points), n, device=device, dtype=torch.int32) for n in numbers]
    return torch.cat(of_levels)
