#!/usr/bin/env python
"""Plot AP and loss of one or several runs over the iterations.

python tools/plot_metrics.py output/pretrain --output curves.svg
python tools/plot_metrics.py output/dynamic_detr output/faster_rcnn --output compared.svg
"""

import argparse
import json
import sys
from pathlib import Path

from dynamic_detr.cli.exits import report_user_errors
from dynamic_detr.errors import UserError

METRICS = ("bbox/AP", "total_loss")
FORMATS = (".svg", ".png", ".pdf")
Curve = tuple[list[int], list[float]]


def read_curves(path: Path) -> dict[str, Curve]:
    """Read the iterations, from 1, and values of "bbox/AP" and "total_loss" from a metrics.json.

    A resumed run may have repeated some iterations; the later line is used. Incomplete lines of
    killed runs are skipped.

    Args:
        path: the file, which may be absent.
    """
    values: dict[str, dict[int, float]] = {metric: {} for metric in METRICS}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for metric in METRICS:
            if isinstance(record, dict) and metric in record:
                values[metric][record["iteration"] + 1] = record[metric]
    return {
        metric: tuple(map(list, zip(*sorted(found.items()), strict=True)))
        for metric, found in values.items()
        if found
    }


def read(run: Path) -> dict[str, Curve]:
    """Read the curves of a run.

    Args:
        run: `OUTPUT_DIR` of the run, or its metrics.json.

    Raises:
        UserError: there is no metrics.json, or it has neither metric.
    """
    path = run / "metrics.json" if run.is_dir() else run
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        curves = read_curves(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not curves:
        raise UserError(f"{path} is not a metrics.json with bbox/AP or total_loss")
    return curves


def plot(runs: list[Path], output: Path) -> None:
    """Write the figure of all runs to a file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dynamic_detr"  # makes files reproducible
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curves = {run.resolve().name: read(run) for run in runs}
    if len(curves) < len(runs):  # folders with the same name
        curves = {str(run): read(run) for run in runs}
    for number, (name, metrics) in enumerate(curves.items()):
        for axis, metric in zip(axes, METRICS, strict=True):
            if metric not in metrics:
                print(f"plot_metrics.py: note: {name} has no {metric}", file=sys.stderr)
            iterations, values = metrics.get(metric, ([], []))
            # A line with one point is invisible.
            marker = "o" if metric == "bbox/AP" or len(values) == 1 else ""
            axis.plot(iterations, values, f"C{number}", marker=marker, markersize=4, label=name)
    for axis, title in zip(axes, ("box AP", "training loss"), strict=True):
        axis.set(title=title, xlabel="iterations")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    if len(runs) > 1:
        axes[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="OUTPUT_DIR of a run, or a metrics.json")
    parser.add_argument("--output", type=Path, default=Path("metrics.svg"), help=", ".join(FORMATS))
    args = parser.parse_args(argv)
    with report_user_errors("plot_metrics.py"):
        if args.output.suffix.lower() not in FORMATS:
            raise UserError(f"--output {args.output} must end in {', '.join(FORMATS)}")
        plot(args.runs, args.output)
        print(args.output)


if __name__ == "__main__":
    main()
