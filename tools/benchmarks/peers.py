"""Times of the operators of this project and of other packages on the same tensors.

Deformable convolution is compared with deformops and torchvision, deformable attention with
deformops and Hugging Face's transformers. Packages that are not installed are skipped.
"""

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

__all__ = ["measure_peers"]

Shapes = list[tuple[int, int]]


def measure_peers(args: argparse.Namespace, device: str) -> list[dict]:
    """Return a row for each operator, pass and package ("ours" first).

    Args:
        args: command line of benchmark.py.
        device: "cuda" or "cpu".

    Returns:
        Rows with "name", "package", "milliseconds" and "spread"; "peak_bytes", None on a CPU;
        "ours_to_theirs", the ratio of times; "difference", the largest difference of the results
        over the largest result, or None; "ran_in", dtypes. A package that fails has a row with
        "name", "package" and "error".
    """
    dtype = getattr(torch, args.dtype)
    rows = []
    conv = _conv_case(args.size, dtype, device)
    attention, shapes = attention_case(args.size, dtype, device), attention_shapes(args.size)
    for case, peers in (
        (conv, {"deformops": _deformops_conv, "torchvision": conv.baseline[1]}),
        (
            attention,
            {
                "deformops": partial(_deformops_attention, shapes),
                "transformers": partial(_transformers_attention, shapes),
            },
        ),
    ):
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
                except Exception as error:  # packages raise different errors
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
    """Return `deform_conv_case` with channels-last maps, the layout that deformops requires."""
    case = deform_conv_case(size, dtype, device)
    *maps, weight = case.tensors
    maps = [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps]
    return replace(case, tensors=(*maps, weight))


def _deformops_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Call deformops, whose maps are (B, H, W, C) and offsets (B, H, W, 1, taps, 2)."""
    from deformops.registry import conv

    x, offset, mask = (tensor.permute(0, 2, 3, 1) for tensor in (x, offset, mask))
    taps = mask.shape[-1]
    offset, mask = offset.unflatten(-1, (1, taps, 2)), mask.unflatten(-1, (1, taps))
    return conv(x, offset, weight, None, mask.to(x.dtype), 1, 1).permute(0, 3, 1, 2)


def _levels(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return heights and widths (L, 2), and the first row of each level (L,)."""
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
