"""The operators beside those of other packages, on the same tensors: deformops and torchvision for
deformable convolution, deformops and Hugging Face's transformers for deformable attention. A
package that is not installed is left out."""

import argparse
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from dynamic_detr.errors import one_line

from .operators import Case, attention_case, attention_shapes, deform_conv_case, timed_call
from .products import dtypes_of
from .timing import time_in_turns
from .usual import usual_deform_conv2d

__all__ = ["measure_peers"]

Shapes = list[tuple[int, int]]


def measure_peers(args: argparse.Namespace, device: str) -> list[dict]:
    """A row for each operator, pass and package, with ours first.

    Returns:
        name, package, milliseconds and spread; peak_bytes on a GPU; ours_to_theirs, a ratio of
        times; difference, the largest of the results over the largest result; ran_in, dtypes. Of a
        package that fails, name, package and error.
    """
    dtype = getattr(torch, args.dtype)
    rows = []
    shapes = attention_shapes(args.size)
    for build, peers in (
        (_conv_case, {"deformops": _deformops_conv, "torchvision": _torchvision_conv}),
        (
            attention_case,
            {
                "deformops": partial(_deformops_attention, shapes),
                "transformers": partial(_transformers_attention, shapes),
            },
        ),
    ):
        case = build(args.size, dtype, device)
        with torch.no_grad():
            wanted = case.ours(*case.tensors)
        for backward in (False, True):
            name = f"{case.name}, " + ("forward + backward" if backward else "forward")
            calls, differences = {"ours": timed_call(case.ours, case.tensors, backward)}, {}
            for package, function in peers.items():
                if find_spec(package) is None:
                    continue
                try:
                    with torch.no_grad():
                        found = function(*case.tensors)
                    calls[package] = timed_call(function, case.tensors, backward)
                    calls[package]()
                except Exception as error:  # whatever another package may raise
                    reason = f"{type(error).__name__}: {one_line(error)[:200]}"
                    rows.append({"name": name, "package": package, "error": reason})
                    calls.pop(package, None)
                    continue
                difference = (found.float() - wanted.float()).abs().max()
                differences[package] = (difference / wanted.float().abs().max()).item()
            timings = time_in_turns(calls, device, args.repeats, args.budget, name)
            for package, timing in timings.items():
                rows.append(
                    {
                        "name": name,
                        "package": package,
                        "milliseconds": 1e3 * timing.median,
                        "spread": timing.spread,
                        "peak_bytes": timing.peak_bytes,
                        "ours_to_theirs": timings["ours"].median / timing.median,
                        "difference": differences.get(package),
                        "ran_in": dtypes_of(calls[package]),
                    }
                )
    return rows


def _conv_case(size: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """With all maps channels-last, the layout that deformops asks for."""
    case = deform_conv_case(size, dtype, device)
    *maps, weight = case.tensors
    maps = [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps]
    return replace(case, tensors=(*maps, weight))


def _deformops_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Its tensors are (B, H, W, C), and those of sampling (B, H, W, 1, taps, ...)."""
    from deformops.registry import conv

    x, offset, mask = (tensor.permute(0, 2, 3, 1) for tensor in (x, offset, mask))
    taps = mask.shape[-1]
    offset, mask = offset.unflatten(-1, (1, taps, 2)), mask.unflatten(-1, (1, taps))
    return conv(x, offset, weight, None, mask.to(x.dtype), 1, 1).permute(0, 3, 1, 2)


def _torchvision_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return usual_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1)


def _levels(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Heights and widths, and the row at which each level starts."""
    sizes = torch.tensor(shapes, device=device)
    areas = sizes.prod(dim=1)
    return sizes, areas.cumsum(0) - areas


def _deformops_attention(
    shapes: Shapes, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    from deformops.registry import msda

    return msda(value, *_levels(shapes, value.device), locations, weights.to(value.dtype))


def _transformers_attention(
    shapes: Shapes, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    from transformers.models.deformable_detr import modeling_deformable_detr

    attend = modeling_deformable_detr.MultiScaleDeformableAttention()
    sizes, starts = _levels(shapes, value.device)
    locations, weights = locations.to(value.dtype), weights.to(value.dtype)
    return attend(value, sizes, shapes, starts, locations, weights, 64)
