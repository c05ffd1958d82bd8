#!/usr/bin/env python
"""Train detectors on equal terms, also Detectron2's own, and write one page of results.

python tools/compare.py --config-file A.yaml --config-file B.yaml --iterations 1000 --output DIR
python tools/compare.py --output DIR --config-file C.yaml   # add a detector and train it
python tools/compare.py --output DIR --seeds 3              # add seeds and train them
python tools/compare.py --output DIR --page-only            # write the page again, train nothing

All detectors use the data, input, batch, schedule, weight average and initial weights of the first
configuration. Each keeps its optimiser, with the learning rate scaled to the batch size
(tools/comparison/terms.py). To continue an interrupted comparison, repeat the command.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

from benchmark import machine
from comparison.page import write_page
from comparison.pictures import truth_boxes, wrong_or_right
from comparison.plan import DATA, Plan
from comparison.results import METRICS, detections, gather, measure, threshold, truth
from comparison.runs import train_all
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from make_scenes import at_least
from tabulate import tabulate

from dynamic_detr import compat
from dynamic_detr.cli.exits import EXIT_USER_ERROR, report_user_errors

PROGRAM = "compare.py"
COSTS = {  # columns of the table: key in a detector's results, digits
    "ms an image": ("inference_ms", 1),
    "s a step": ("step_s", 3),
    "peak MB": ("peak_mb", 0),
    "parameters, M": ("parameters_m", 1),
    "GMAC": ("gmac", 2),
}
_EPILOG = "exit codes: 0 all runs are finished; 2 wrong arguments, or a run failed or was stopped"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        action="append",
        help="configuration of a detector: a path, or a name in Detectron2's model zoo; repeatable",
    )
    for name in DATA:
        kind = "FILE" if name.endswith("json") else "DIR"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=kind, help="as for train_net.py")
    parser.add_argument(
        "--iterations", type=at_least(1), help="per run (default: those of the first configuration)"
    )
    parser.add_argument("--evaluations", type=at_least(1), help="per run (default: 5)")
    parser.add_argument("--seeds", type=at_least(1), help="runs per detector (default: 1)")
    parser.add_argument("--num-gpus", type=int, help="per run, as for train_net.py")
    parser.add_argument("--num-processes", type=int, help="per run, as for train_net.py")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), metavar="DIR")
    parser.add_argument("--budget-minutes", type=float, help="stop training after this time")
    parser.add_argument("--note", metavar="TEXT", help="text for the page")
    parser.add_argument("--page-only", action="store_true", help="write the page, train nothing")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of all configurations")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    flags = {"--num-gpus": args.num_gpus, "--num-processes": args.num_processes}
    args.devices = [str(w) for pair in flags.items() if pair[1] is not None for w in pair]
    return args


def terms_table(plan: Plan) -> str:
    rows = [
        [name, own["optimizer"], f"{own['rate']:.3g} = {own['rule']}", own["clip"], own["start"]]
        for name, own in plan.terms.items()
    ]
    headers = ["detector", "optimiser", "rate", "clipping", "backbone"]
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def result_table(results: dict) -> str:
    rows = []
    for name, detector in results["detectors"].items():
        final = [detector["final"][metric] for metric in METRICS]
        cells = [f"{value['mean']:.1f}" if value else "" for value in final]
        if final[0] and final[0]["deviation"] is not None:
            cells[0] += f" ± {final[0]['deviation']:.1f}"
        for key, digits in COSTS.values():
            value = detector.get(key)
            cells.append("" if value is None else f"{value:.{digits}f}")
        done = sum(run["status"] == "finished" for run in detector["runs"])
        rows.append([name, *cells, f"{done} of {len(detector['runs'])}"])
    headers = ["detector", *METRICS, *COSTS, "runs finished"]
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def boxes_of(plan: Plan, annotations: dict) -> dict[str, Callable[[dict], list[dict]]]:
    """Return the rows of pictures on the page.

    Returns:
        For "annotated" and each trained detector, a function from an image record to its boxes.
    """
    rows = {"annotated": partial(truth_boxes, annotations)}
    for run in plan.runs():
        if run.name not in rows and run.final():
            by_image = defaultdict(list)
            for box in wrong_or_right(annotations, detections(run), threshold(run)):
                by_image[box["image_id"]].append(box)
            rows[run.name] = lambda record, found=by_image: found[record["id"]]
    return rows


def stored(folder: Path) -> tuple[dict[str, dict], str]:
    """Return the measurements of an earlier command by detector, and its machine."""
    path = folder / "results.json"
    if not path.is_file():
        return {}, ""
    results = json.loads(path.read_text())
    return results["detectors"], results["machine"]


def machine_text(device: str) -> str:
    about = machine(device)
    return ", ".join([about.pop("machine"), *(f"{name} {text}" for name, text in about.items())])


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    compat.ignore_known_warnings()
    setup_logger(name="dynamic_detr").setLevel(logging.WARNING)
    with report_user_errors(PROGRAM):
        plan = Plan.merge(args.output, args, shlex.join(["python", "tools/compare.py", *words]))
        if not args.page_only:
            plan.compose()
            print(terms_table(plan), flush=True)
        configs = plan.composed(register=args.page_only)
        annotations = truth(configs)
        if args.page_only:
            measured, where = stored(args.output)
        else:
            train_all(plan.runs(), plan.flags(), args.budget_minutes)
            measured, where = measure(plan, configs), machine_text(plan.device)
        results = {**gather(plan, configs, annotations, measured), "machine": where}
        pictures = MetadataCatalog.get(results["data_set"]).image_root
        page = write_page(results, annotations, Path(pictures), boxes_of(plan, annotations))
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "index.html").write_text(page)
        print(f"\n{result_table(results)}\n\n{args.output / 'index.html'}")
        unfinished = [run for run in plan.runs() if run.status() != "finished"]
        for run in unfinished:
            print(f"{PROGRAM}: {run.title}: {run.status()}", file=sys.stderr)
        if unfinished:
            sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
