"""Results of a comparison, collected from the folders of its runs."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.costs import config_costs
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from plot_metrics import read_curves

from dynamic_detr.errors import UserError, one_line, tell

from .errors import KINDS, error_table
from .plan import Plan
from .runs import Run
from .speed import measure_speed

__all__ = ["METRICS", "detections", "gather", "measure", "threshold", "truth"]

MEASURED = (  # keys that `measure` returns
    *("inference_ms", "inference_spread", "step_s", "step_spread", "size"),
    *("parameters_m", "gmac"),
)
METRICS = ("AP", "AP50", "APs", "APm", "APl")


def truth(configs: dict[str, CfgNode]) -> dict:
    """Return the annotations of the evaluation dataset in COCO format.

    Args:
        configs: configurations of the detectors, with registered datasets.

    Raises:
        UserError: the dataset cannot be read, or has no COCO file.
    """
    name = next(iter(configs.values())).DATASETS.TEST[0]
    try:
        DatasetCatalog.get(name)  # some datasets set their metadata when they are loaded
    except OSError as error:
        raise UserError(f"the dataset {name} cannot be read ({one_line(error)})") from error
    path = MetadataCatalog.get(name).get("json_file")
    if not path:
        raise UserError(f"the dataset {name} has no file in COCO format, which compare.py requires")
    return json.loads(Path(path).read_text())


def detections(run: Run) -> list[dict]:
    """Return the COCO results of the last evaluation of a finished run."""
    return json.loads((run.folder / "inference" / "coco_instances_results.json").read_text())


def measure(plan: Plan, configs: dict[str, CfgNode]) -> dict[str, dict]:
    """Measure times, parameters and GMAC of every detector that has a finished run.

    Returns:
        The keys of `MEASURED` for each detector; "parameters_m" and "gmac" only if they can be
        counted.
    """
    trained = {}
    for run in plan.runs():
        if run.name not in trained and run.final():
            trained[run.name] = configs[run.name].clone()
            trained[run.name].MODEL.WEIGHTS = str(run.model)
    if not trained:
        return {}
    found = measure_speed(trained)
    for name, row in found.items():
        try:
            row["parameters_m"], gmac = config_costs(str(plan.config(name)), row["size"])
            row["gmac"] = gmac["all"]
        except UserError as error:  # an unknown meta-architecture
            tell(f"{name}: parameters and GMAC are not counted ({one_line(error)})")
    return found


def gather(
    plan: Plan, configs: dict[str, CfgNode], annotations: dict, measured: dict[str, dict]
) -> dict:
    """Collect the content of `results.json`.

    Args:
        plan: plan of the comparison.
        configs: configurations of the detectors.
        annotations: result of `truth`.
        measured: result of `measure`.
    """
    cfg = next(iter(configs.values()))
    detectors = {}
    for name in plan.configs:
        runs = [run for run in plan.runs() if run.name == name]
        finished = [run for run in runs if run.final()]
        detectors[name] = {
            "config": plan.configs[name],
            "terms": plan.terms[name],
            "batch": cfg.SOLVER.IMS_PER_BATCH,
            "runs": [_run(run, cfg.SOLVER.IMS_PER_BATCH) for run in runs],
            "final": {
                metric: spread([_final(run).get(metric) for run in finished]) for metric in METRICS
            },
            "peak_mb": max((run.log().get("peak_mb", 0) for run in finished), default=None),
            "errors": _errors(annotations, finished),
            **{key: measured[name][key] for key in MEASURED if key in measured.get(name, {})},
        }
    return {
        "commands": plan.commands,
        "note": plan.note,
        "data_set": cfg.DATASETS.TEST[0],
        "images": len(annotations["images"]),
        "objects": sum(not a.get("iscrowd") for a in annotations["annotations"]),
        "shared": _shared(plan, cfg),
        "detectors": detectors,
    }


def _final(run: Run) -> dict[str, float]:
    """Return the metrics of the last evaluation."""
    metrics = run.final().metrics
    return {**metrics, **{name: _or_zero(metrics.get(name)) for name in ("AP", "AP50")}}


def _or_zero(ap: float | None) -> float:
    """Return the AP; 0 for None and NaN, which Detectron2 reports if nothing was detected."""
    return ap if ap is not None and math.isfinite(ap) else 0.0


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return "mean", sample standard "deviation" and number of "runs"; None without values.

    Args:
        values: a value per run; None is skipped.
    """
    values = [value for value in values if value is not None]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "runs": len(values)}


def _run(run: Run, batch: int) -> dict:
    iterations, values = read_curves(run.folder / "metrics.json").get("bbox/AP", ([], []))
    curve = [
        (min(iteration, run.iterations) * batch, _or_zero(value))
        for iteration, value in zip(iterations, values, strict=True)
    ]
    return {"seed": run.seed, "status": run.status(), "curve": curve}


def _errors(annotations: dict, finished: Sequence[Run]) -> dict[str, dict[str, float]] | None:
    """Return the means of `error_table` over the seeds; None without a finished run."""
    tables = [error_table(annotations, detections(run), threshold(run)) for run in finished]
    if not tables:
        return None
    return {
        kind: {
            key: statistics.fmean(table[kind][key] for table in tables) for key in tables[0][kind]
        }
        for kind in KINDS
    }


def threshold(run: Run) -> float:
    """Return the score threshold of the best F1; above 1 if nothing was detected."""
    threshold = run.final().threshold
    return 1.01 if threshold is None else threshold


def _shared(plan: Plan, cfg: CfgNode) -> dict[str, str]:
    solver, size = cfg.SOLVER, cfg.INPUT
    steps = ", ".join(f"{100 * step / solver.MAX_ITER:.0f} %" for step in solver.STEPS)
    crop = ", random crops of half of the images" if size.CROP_BRANCH.ENABLED else ""
    crop += f", random crops ({size.CROP.TYPE})" if size.CROP.ENABLED else ""
    sides = f"{min(size.MIN_SIZE_TRAIN)}"
    if len(set(size.MIN_SIZE_TRAIN)) > 1:
        sides += f" to {max(size.MIN_SIZE_TRAIN)}"
    return {
        "data": ", ".join(plan.data.values() or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]),
        "length": f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images = "
        f"{solver.MAX_ITER * solver.IMS_PER_BATCH} images, in the same order for the same seed",
        "input in training": f"shorter side {sides}, longer at most {size.MAX_SIZE_TRAIN} pixels, "
        f"flip {size.RANDOM_FLIP}{crop}",
        "input in evaluation": f"shorter side {size.MIN_SIZE_TEST}, longer at most "
        f"{size.MAX_SIZE_TEST} pixels",
        "schedule": f"warm-up of {solver.WARMUP_ITERS} iterations, rate times {solver.GAMMA:g} "
        f"after {steps or 'none'} of the run",
        "average": f"of the weights, decay {solver.EMA.DECAY:g}" if solver.EMA.ENABLED else "none",
        "precision": solver.AMP.DTYPE if solver.AMP.ENABLED else "float32",
        "seeds": ", ".join(map(str, range(1, plan.seeds + 1))),
        "devices": " ".join(plan.devices) or "one process",
    }
