"""Compiles kernels for GPUs that are not there: what a launch would run is compiled instead, down
to machine code, and what it will take of the GPU is printed as JSON.

python tests/compile_kernels.py --architecture 90 --dtype float32     # without TRITON_INTERPRET
"""

import argparse
import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages")


def kind(value: object) -> str:
    """The type of an argument, as Triton writes it."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel takes {value!r}")


def source(kernel: JITFunction, arguments: dict[str, object]) -> ASTSource:
    """The kernel for these arguments, specialised as a launch specialises it: ones and absent
    tensors are constants, multiples of 16 are known to be so."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        place, value = (parameter.num,), arguments[parameter.name]
        if isinstance(value, tuple):
            signature[parameter.name] = tuple(kind(item) for item in value)
            continue
        special = not parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and special
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[place] = value
            continue
        signature[parameter.name] = kind(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and special):
            attributes[place] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes that it holds in memory for want of them."""
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [reader, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "stack": int(re.search(r"STACK:(\d+)", said)[1]),
    }


def compile_launches(run: Callable[[], object], architecture: int) -> Iterator[dict]:
    """What every kernel that the function would launch takes."""
    launches = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object):
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        names = [parameter.name for parameter in kernel.params]
        launches.append((kernel, {**dict(zip(names, args, strict=False)), **kwargs}, options))

    launch, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = launch
    for kernel, arguments, options in launches:
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
        yield {
            "kernel": kernel.__name__,
            "architecture": architecture,
            "shared": compiled.metadata.shared,
            **resources(compiled.asm["cubin"]),
        }


def deform_conv(dtype: torch.dtype, channels: int, groups: int) -> None:
    from dynamic_detr.ops.kernels import deform_conv

    features = torch.empty(1, channels, 20, 30, dtype=dtype)
    offset, mask = torch.empty(1, 18, 20, 30), torch.empty(1, 9, 20, 30)
    weight = torch.empty(channels, channels // groups, 3, 3, dtype=dtype)
    geometry = (1, 1, 1, groups)
    deform_conv.forward(features, offset, mask, weight, None, *geometry)
    deform_conv.backward(features, features, offset, mask, weight, *geometry, True, True, True)


def encoder_level(dtype: torch.dtype, neighbours: bool) -> None:
    from dynamic_detr.ops.kernels import fuse_levels

    same = torch.empty(1, 256, 20, 30, dtype=dtype)
    finer, coarser = (same, same[..., ::2, ::2]) if neighbours else (None, None)
    maps = (same, finer, coarser, torch.ones(1, 2, dtype=torch.int64))
    moments, coefficients = torch.empty(3, 3, 1, 256), torch.empty(7, 1, 256)
    fuse_levels.moments(*maps)
    fuse_levels.fuse(*maps, coefficients)
    fuse_levels.coefficient_gradients(same, *maps, coefficients)
    fuse_levels.map_gradients(*maps, moments, moments, same, coefficients)


def roi_align(dtype: torch.dtype) -> None:
    from dynamic_detr.ops.kernels import roi_align

    shapes, boxes, sizes = [20, 30, 10, 15], torch.empty(1, 300, 4), torch.ones(1, 2).long()
    pooling = (boxes, sizes, shapes, (4, 8), 7, 2, 1e3)
    pooled = roi_align.forward(torch.empty(1, 750, 256, dtype=dtype), *pooling)
    roi_align.backward(pooled, *pooling)


def attention(dtype: torch.dtype) -> None:
    from dynamic_detr.ops.kernels import ms_deform_attn

    value = torch.empty(1, 750, 8, 32, dtype=dtype)
    locations, weights = torch.empty(1, 900, 8, 2, 4, 2), torch.empty(1, 900, 8, 2, 4)
    shapes = [20, 30, 10, 15]
    out = ms_deform_attn.forward(value, locations, weights, shapes)
    ms_deform_attn.backward(out, value, locations, weights, shapes, True, True)


CASES = {
    "deform_conv": lambda dtype: deform_conv(dtype, 256, 1),
    "deform_conv, 32 groups": lambda dtype: deform_conv(dtype, 256, 32),
    "encoder level": lambda dtype: encoder_level(dtype, True),
    "encoder level, no neighbours": lambda dtype: encoder_level(dtype, False),
    "roi_align": roi_align,
    "ms_deform_attn": attention,
}


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_kernels.py: TRITON_INTERPRET is set; nothing would be compiled.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--architecture", type=int, default=90, help="80: A100; 90: H100")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    for case in args.cases:
        run = functools.partial(CASES[case], getattr(torch, args.dtype))
        for said in compile_launches(run, args.architecture):
            print(json.dumps({"case": case, "dtype": args.dtype, **said}), flush=True)


if __name__ == "__main__":
    main()
