"""Multi-scale deformable attention (Deformable DETR, equation 3): each head of a query sums a few
samples of a pyramid of values, at places and with weights of its own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backend import kernel_serves
from .plain.bilinear import BilinearSamples
from .plain.gather import add_table_gradient, weight_gradient, weighted_gather

__all__ = ["ms_deform_attn"]

CHUNK = 1 << 21  # rows gathered at a time on PyTorch's operators: what steers them stays small


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sums samples of all levels: out = Σ_lp weight_lp · value_l(location_lp), head by head.

    A sample is bilinear on a map that zeros surround; one nowhere (not finite) is zero. Nothing
    but the arguments is kept for the backward pass. On a GPU the gradient of the values is added
    up in an order that changes from run to run, unless `torch.use_deterministic_algorithms` is
    on, which costs the kernel's speed. There are no gradients of gradients.

    Args:
        value: (B, ΣHW, heads, d), the levels one after the other, each row by row
            (`Pyramid.table`, projected).
        spatial_shapes: (H, W) of each of the L levels.
        sampling_locations: (B, Q, heads, L, P, 2) x, y, normalised: (0, 0) is the upper left
            corner of the upper left pixel, (1, 1) the lower right corner of the lower right one.
            Float32 recommended, as half precision places samples coarsely.
        attention_weights: (B, Q, heads, L, P).

    Returns:
        (B, Q, heads·d) in the dtype of value (under autocast: in the autocast dtype). Positions
        and weights are computed in float32 whatever the values are.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the line names the argument.
    """
    _check_kinds(value, sampling_locations, attention_weights)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device))
    shapes = [side for shape in spatial_shapes for side in shape]
    with torch.autocast(device, enabled=False):
        return _forward(value, sampling_locations, attention_weights, shapes)


def _check_kinds(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    for name, tensor in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if not tensor.is_floating_point():
            raise ValueError(f"ms_deform_attn: {name} is {tensor.dtype}; wants a floating dtype.")
        if tensor.device != value.device:
            raise ValueError(
                f"ms_deform_attn: {name} is on {tensor.device}; wants {value.device}, as value."
            )


def _check_shapes(value, spatial_shapes, sampling_locations, attention_weights) -> None:
    if value.dim() != 4 or min(value.shape[2:]) < 1:
        raise ValueError(
            f"ms_deform_attn: value has shape {tuple(value.shape)}; wants (B, ΣHW, heads, d), "
            "heads and d at least 1."
        )
    if not _are_sizes(spatial_shapes):
        raise ValueError(
            f"ms_deform_attn: spatial_shapes is {' '.join(repr(spatial_shapes).split())}; "
            "wants a list of integers (H, W) of at least one level, all at least 1."
        )
    batch, rows, heads, _ = value.shape
    positions = sum(height * width for height, width in spatial_shapes)
    if rows != positions:
        raise ValueError(
            f"ms_deform_attn: value has shape {tuple(value.shape)}; wants {positions} rows, as "
            f"many as spatial_shapes {list(spatial_shapes)} have positions."
        )
    shape, levels = sampling_locations.shape, len(spatial_shapes)
    fits = len(shape) == 6 and (shape[0], *shape[2:4], shape[5]) == (batch, heads, levels, 2)
    if not fits or shape[4] < 1:
        raise ValueError(
            f"ms_deform_attn: sampling_locations has shape {tuple(shape)}; "
            f"wants ({batch}, Q, {heads}, {levels}, P, 2), P at least 1."
        )
    if attention_weights.shape != shape[:-1]:
        raise ValueError(
            f"ms_deform_attn: attention_weights has shape {tuple(attention_weights.shape)}; "
            f"wants {tuple(shape[:-1])}."
        )


def _are_sizes(shapes: object) -> bool:
    """Python numbers: reading a tensor's would stall the device."""
    if not isinstance(shapes, (tuple, list)) or not shapes:
        return False
    return all(
        isinstance(shape, (tuple, list))
        and len(shape) == 2
        and all(isinstance(side, (int, torch.SymInt)) and side > 0 for side in shape)
        for shape in shapes
    )


# `shapes` are the levels' (H, W), one after the other.
@torch.library.custom_op("dynamic_detr::ms_deform_attn", mutates_args=())
def _forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    if kernel_serves(value):
        from .kernels import ms_deform_attn

        return ms_deform_attn.forward(value, locations, weights, shapes)
    out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    table = _table(value.detach())
    for image, queries in _chunks(locations):
        samples = _Samples(locations[image, queries], weights[image, queries], shapes)
        pooled = weighted_gather(table[image], samples.index, samples.weight)
        part = out[image, queries]
        part.copy_(pooled.view_as(part))
    return out


@_forward.register_fake
def _(value, locations, weights, shapes):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("dynamic_detr::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    needs_value: bool,
    needs_sampling: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (grad_out, value, locations, weights, shapes, needs_value, needs_sampling)
    ordered = needs_value and torch.are_deterministic_algorithms_enabled()
    if kernel_serves(value) and not ordered:
        from .kernels import ms_deform_attn

        grads = ms_deform_attn.backward(*arguments)
    else:
        grads = _gather_backward(*arguments)
    return tuple(
        like.new_empty(0) if grad is None else grad
        for grad, like in zip(grads, (value, locations, weights), strict=True)
    )


@_backward.register_fake
def _(grad_out, value, locations, weights, shapes, needs_value, needs_sampling):
    needs = (needs_value, needs_sampling, needs_sampling)
    return tuple(
        like.new_empty(like.shape if needed else 0)
        for like, needed in zip((value, locations, weights), needs, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    value, locations, weights, ctx.shapes = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad_out: Tensor):
    needs_value, needs_locations, needs_weights, _ = ctx.needs_input_grad
    grads = _backward(
        grad_out, *ctx.saved_tensors, ctx.shapes, needs_value, needs_locations or needs_weights
    )
    needs = (needs_value, needs_locations, needs_weights)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _gather_backward(
    grad_out, value, locations, weights, shapes, needs_value, needs_sampling
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
    """One row for each position and head: (B, ΣHW·heads, d), float32 or wider, contiguous."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return wide.contiguous().flatten(1, 2)


def _chunks(locations: Tensor) -> Iterator[tuple[int, slice]]:
    """An image and some of its queries, that gather about CHUNK rows."""
    batch, queries, heads, levels, points, _ = locations.shape
    step = max(1, CHUNK // (heads * levels * points * 4))
    for image in range(batch):
        for first in range(0, queries, step):
            yield image, slice(first, min(first + step, queries))


class _Samples:
    """What some queries sample of one image's table: `index` and `weight` (n·heads, L·P·4).

    Args:
        locations: (n, heads, L, P, 2).
        weights: (n, heads, L, P).
        shapes: H and W of each level, one after the other.
    """

    def __init__(self, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> None:
        heads, device = locations.shape[1], locations.device
        dtype = torch.promote_types(locations.dtype, torch.float32)
        locations, attention = locations.to(dtype), weights.to(dtype)
        areas = [height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True)]
        first_rows = [sum(areas[:level]) for level in range(len(areas))]
        self.height, self.width = _column(shapes[::2], device), _column(shapes[1::2], device)
        self.bilinear = BilinearSamples(
            locations[..., 1] * self.height - 0.5,
            locations[..., 0] * self.width - 0.5,
            self.height,
            self.width,
            attention,
        )  # (n, heads, L, P)
        head = torch.arange(heads, device=device, dtype=torch.int32)[:, None, None, None]
        index = self.bilinear.index(self.width).add_(_column(first_rows, device)[..., None])
        self.index = index.mul_(heads).add_(head).flatten(2).flatten(0, 1)
        self.weight = self.bilinear.weight().flatten(2).flatten(0, 1)

    def write_gradients(self, grad: Tensor, grad_locations: Tensor, grad_weights: Tensor) -> None:
        """Stores those of locations and attention weights, given that of `weight`."""
        grad_y, grad_x, grad_attention = self.bilinear.backward(grad.view(*self.bilinear.shape, 4))
        grad_locations[..., 0], grad_locations[..., 1] = grad_x * self.width, grad_y * self.height
        grad_weights.copy_(grad_attention)


def _column(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(L, 1) int32, filled on the device: a copy from the host would stall it."""
    return torch.cat([torch.full((1, 1), n, device=device, dtype=torch.int32) for n in numbers])
