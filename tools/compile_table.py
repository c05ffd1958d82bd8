#!/usr/bin/env python
"""Compile every Triton kernel without a GPU, and tabulate its registers, spills, shared memory,
tensor-core instructions, widths of loads and atomics, and an estimate of its time.

python tools/compile_table.py                               # prints the tables
python tools/compile_table.py --output docs/kernels.md
python tools/compile_table.py deform_conv --architecture 80 --dtype float32
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.errors import UserError

PROGRAM = "compile_table.py"
L2_BYTES = 5120  # per clock: NVIDIA's figure for the A100, used for the H100 too


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peak numbers from the data sheet of a GPU.

    Args:
        name: name in the tables.
        bandwidth: memory bandwidth in bytes per second.
        flops: dense FLOP/s of matrix products by dtype; float32 without TF32.
        clock: boost clock in hertz.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]
    clock: float


def _flops(half: float, full: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "float32": full}


GPUS = {
    80: Gpu("A100", 2.04e12, _flops(312e12, 19.5e12), 1.41e9),
    90: Gpu("H100", 3.35e12, _flops(989e12, 67e12), 1.755e9),
}
PAGE = """# Compiled kernels

Written by `{command}` with Triton {triton}, without a
GPU and without timing. Shapes are those of one 800 × 1344 image in {dtype}: the finest level (P2,
200 × 336, 256 channels) for deformable convolution and fusion, all levels for RoIAlign (300 boxes)
and attention (one query for each position of strides 8 to 64).

## Resources

Instructions are counted in the machine code; loops execute them more often. Loads are listed by
width in bits, atomics by the number of values that each adds.

{code}

## Estimated time

The estimate is the largest of three times at the peak rates of the GPU: reading or writing every
tensor once; the matrix products; and the gathers and atomic additions (4 bytes read and 4 written
each) through the L2 cache at 5,120 bytes per clock, without hits in the L1 cache.

{estimates}
"""


def describe(case: str, dtype: str, architecture: int) -> list[dict]:
    """Return resources and estimated seconds of each kernel of an operator."""
    from compiled.cases import CASES, Work
    from compiled.launches import record_launches
    from compiled.machine_code import read_machine_code

    run, work = CASES[case].run, CASES[case].work
    gpu, itemsize = GPUS[architecture], getattr(torch, dtype).itemsize
    rows = []
    for launch in record_launches(functools.partial(run, getattr(torch, dtype))):
        compiled = launch.compile(architecture)
        done = work.get(launch.name, Work())
        cache_bytes = done.gathered * itemsize + done.added * 8
        rows.append(
            {
                "case": case,
                "kernel": launch.name,
                "architecture": architecture,
                "dtype": dtype,
                "programs": functools.reduce(int.__mul__, launch.grid),
                "warps": compiled.metadata.num_warps,
                "shared": compiled.metadata.shared,
                **dataclasses.asdict(read_machine_code(compiled.asm["cubin"])),
                "tensor_bytes": launch.tensor_bytes,
                **dataclasses.asdict(done),
                "seconds": {
                    "memory": launch.tensor_bytes / gpu.bandwidth,
                    "products": done.flop / gpu.flops[dtype],
                    "gathers and atomics": cache_bytes / (L2_BYTES * gpu.clock),
                },
            }
        )
    return rows


def _counts(counts: dict, form: str) -> str:
    return ", ".join(f"{n} {form.format(key)}" for key, n in sorted(counts.items())[::-1])


def code_table(rows: list[dict]) -> str:
    table = [
        [
            f"{row['case']}: {row['kernel']}",
            row["architecture"],
            row["programs"],
            row["warps"],
            row["registers"],
            row["stack"],
            f"{row['shared'] / 1024:.0f}",
            ", ".join(f"{n} {name}" for name, n in row["products"].items()),
            _counts(row["loads"], "of {}"),
            _counts(row["atomics"], "×{}"),
        ]
        for row in rows
    ]
    headers = ["kernel", "sm", "programs", "warps", "registers", "spilled, B", "shared, KiB"]
    headers += ["tensor cores", "loads", "atomics"]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def estimate_table(rows: list[dict]) -> str:
    kernels = {}
    for row in rows:
        kernels.setdefault((row["case"], row["kernel"]), []).append(row)
    table = []
    for (case, kernel), of_gpus in kernels.items():
        row = of_gpus[0]
        times = [max((seconds, part) for part, seconds in r["seconds"].items()) for r in of_gpus]
        table.append(
            [
                f"{case}: {kernel}",
                f"{row['tensor_bytes'] / 1e6:.1f}",
                f"{row['flop'] / 1e9:.1f}" if row["flop"] else "",
                f"{row['gathered'] / 1e6:.0f}" if row["gathered"] else "",
                f"{row['added'] / 1e6:.0f}" if row["added"] else "",
                *(f"{1e6 * seconds:.0f} ({part})" for seconds, part in times),
            ]
        )
    headers = ["kernel", "tensors, MB", "GFLOP", "gathered, millions", "atomics, millions"]
    headers += [f"{GPUS[row['architecture']].name}, µs" for row in next(iter(kernels.values()))]
    return tabulate(table, headers, "pipe", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="operators (default: all)")
    parser.add_argument(
        "--architecture", type=int, action="append", choices=list(GPUS), help="80: A100; 90: H100"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, help="write a page with the tables to this file")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each kernel")
    args = parser.parse_args(argv)
    with report_user_errors(PROGRAM):
        if args.output and not args.output.parent.is_dir():
            raise UserError(f"--output: the folder {args.output.parent} does not exist")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise UserError("TRITON_INTERPRET=1 disables the compiler; unset it")
        try:
            import triton
            from compiled.cases import CASES
        except ImportError as error:
            raise UserError(f"Triton cannot be imported ({error}): pip install triton") from error
        unknown = set(args.cases) - set(CASES)
        if unknown:
            raise UserError(f"unknown operator {min(unknown)!r}; known: {', '.join(CASES)}")
        rows = []
        for case in args.cases or CASES:
            for architecture in args.architecture or GPUS:
                for row in describe(case, args.dtype, architecture):
                    rows.append(row)
                    if args.json:
                        print(json.dumps(row), flush=True)
        if args.json:
            return
        command = " ".join(["python tools/compile_table.py", *(argv or sys.argv[1:])])
        tables = {"code": code_table(rows), "estimates": estimate_table(rows)}
        page = PAGE.format(command=command, triton=triton.__version__, dtype=args.dtype, **tables)
        if args.output:
            args.output.write_text(page)
        else:
            print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
