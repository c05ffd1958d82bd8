#!/usr/bin/env python
"""Check the project on a GPU within ten minutes: tests of the kernels and the detector, benchmark,
operators of other packages, and a profile of one training step. All results go into one folder.

python tools/gpu_check.py                   # make gpu-check
python tools/gpu_check.py --rehearse        # the same steps with small shapes, without a GPU too
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.errors import UserError

PROGRAM = "gpu_check.py"
PROJECT = Path(__file__).resolve().parents[1]
BENCHMARK = PROJECT / "tools" / "benchmark.py"
MINUTES = 10.0
TESTS = ("backend", "bilinear", "deform_conv", "ms_deform_attn", "roi_align", "fuse_levels")
TESTS += ("cuda_graphs", "detector", "encoder", "decoder", "criterion", "compile")
REHEARSED_TESTS = ("backend",)
SMALL = ("--size", "64x96", "--repeats", "1", "--batch", "1", "--train-batch", "1")
SMALL += ("--config-file", str(PROJECT / "configs" / "quickstart" / "pretrain.yaml"))
LARGE = ("--size", "800x1344", "--budget", "10")


@dataclass
class Step:
    """A command whose output is written to a file.

    Args:
        name: name of the step and of its file.
        command: arguments of the Python interpreter.
        share: largest share of the remaining time.
    """

    name: str
    command: list[str]
    share: float


def steps(rehearse: bool, output: Path) -> list[Step]:
    """Return the steps, the most important first."""
    names = REHEARSED_TESTS if rehearse else TESTS
    tests = [str(PROJECT / "tests" / f"test_{name}.py") for name in names]
    size = SMALL if rehearse else LARGE

    def benchmark(what: str, dtype: str) -> Step:
        name = f"{what}_{dtype}"
        options = ["--dtype", dtype, "--json", str(output / f"{name}.json"), *size]
        return Step(name, [str(BENCHMARK), what, *options], 0.5)

    return [
        Step("tests", ["-m", "pytest", "-q", "--maxfail", "20", *tests], 0.45),
        benchmark("operators", "bfloat16"),
        benchmark("peers", "bfloat16"),
        benchmark("profile", "bfloat16"),
        benchmark("models", "bfloat16"),
        benchmark("peers", "float32"),
    ]


def run(step: Step, output: Path, seconds: float) -> tuple[str, float]:
    """Run a step, for at most so many seconds, and return its result in words and its duration."""
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start = time.monotonic()
    with open(output / f"{step.name}.txt", "w") as log:
        try:
            code = subprocess.run(
                [sys.executable, *step.command],
                cwd=PROJECT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return "stopped: out of time", time.monotonic() - start
    return "passed" if code == 0 else f"failed with exit code {code}", time.monotonic() - start


def check(output: Path, rehearse: bool, minutes: float) -> bool:
    """Run all steps, write ``summary.md`` and return whether all passed."""
    output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    title = f"{device}, PyTorch {torch.__version__}{', rehearsal' if rehearse else ''}"
    print(title, flush=True)
    end = time.monotonic() + 60 * minutes
    rows = []
    for step in steps(rehearse, output):
        left = end - time.monotonic()
        result, seconds = run(step, output, max(step.share * left, 1))
        rows.append([step.name, result, f"{seconds:.0f}", f"{step.name}.txt"])
        print(f"{step.name}: {result}, {seconds:.0f} s", flush=True)
    table = tabulate(rows, ["step", "result", "s", "output"], "pipe", disable_numparse=True)
    (output / "summary.md").write_text(f"# {title}\n\n{table}\n")
    print(f"{table}\n\nresults: {output}")
    return all(result == "passed" for _, result, *_ in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=PROJECT / "output" / "gpu_check")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on any machine")
    args = parser.parse_args(argv)
    with report_user_errors(PROGRAM):
        if not torch.cuda.is_available() and not args.rehearse:
            raise UserError("there is no GPU here; --rehearse runs the same steps on the CPU")
        if args.minutes <= 0:
            raise UserError(f"--minutes: expected a positive number, got {args.minutes:g}")
        return 0 if check(args.output.resolve(), args.rehearse, args.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
