#!/usr/bin/env python
"""Compile every Triton kernel for GPUs that are not there, and tabulate what each takes of one: its
registers, spills, shared memory, tensor-core instructions, widths of loads and atomics; and an
estimate of its time.

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
L2_BYTES = 5120  # a clock, as NVIDIA states for the A100; taken for the H100 too


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU's peaks, as its data sheet states them.

    Args:
        name: for tables.
        bandwidth: of its memory, bytes a second.
        flops: dense products a second of the tensor cores, by dtype; float32 counts as TF32 is off.
        clock: boosted, in hertz.
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
PAGE = """# What the compiler says of the kernels

Written by `{command}`, with Triton {triton}. No GPU was used,
and nothing was timed. Shapes are those of one image of 800 × 1344 in {dtype}: the finest level
(P2, 200 × 336, 256 channels) for deformable convolution and fusion, all levels for RoIAlign (300
boxes) and attention (a query for each position of strides 8 to 64).

## What a kernel takes

Instructions are counted in the code, not as often as loops run them. Loads are given by their width
in bits, atomics by the numbers that each adds.

{code}

## An estimate, not a measurement

The time that a kernel needs at the peaks of its GPU for the slowest of three things: its tensors,
each once through memory; its products on the tensor cores; and its gathers and atomic additions (4
bytes read and 4 written each) through the L2 cache at 5,120 bytes a clock, as if none were found in
the L1 cache.

{estimates}
"""


def describe(case: str, dtype: str, architecture: int) -> list[dict]:
    """What each kernel of an operator takes, and the parts of its estimate in seconds."""
    from compiled.cases import CASES, Work
    from compiled.launches import record_launches
    from compiled.machine_code import read_machine_code

    run, work = CASES[case].run, CASES[case].work
    gpu, bytes_each = GPUS[architecture], getattr(torch, dtype).itemsize
    rows = []
    for launch in record_launches(functools.partial(run, getattr(torch, dtype))):
        compiled = launch.compile(architecture)
        todo = work.get(launch.name, Work())
        through_cache = todo.gathered * bytes_each + todo.added * 8
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
                **dataclasses.asdict(todo),
                "seconds": {
                    "memory": launch.tensor_bytes / gpu.bandwidth,
                    "products": todo.flop / gpu.flops[dtype],
                    "gathers and atomics": through_cache / (L2_BYTES * gpu.clock),
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
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise UserError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
        try:
            import triton
            from compiled.cases import CASES
        except ImportError as error:
            raise UserError(f"Triton cannot be imported ({error}): pip install triton") from error
        unknown = set(args.cases) - set(CASES)
        if unknown:
            raise UserError(f"{min(unknown)!r} is none of the operators {', '.join(CASES)}")
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
