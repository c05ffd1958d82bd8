"""The page of a comparison: one self-contained HTML file."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from .charts import ERROR_COLOURS, ap_chart, colour, error_chart
from .errors import KINDS
from .pictures import choose, class_legend, embedded, panel

__all__ = ["write_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; }
h2 { font-size: 1.2em; margin: 2em 0 0.4em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.8em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.8em; text-align: right; border-bottom: 1px solid #eee; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
td:first-child { white-space: nowrap; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
.best { font-weight: 700; }
.spread { color: #777; font-size: 0.85em; }
.key { margin-right: 1em; white-space: nowrap; }
.key i, td i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em;
               border-radius: 2px; }
.failed { background: #fdecea; border-left: 4px solid #c0392b; padding: 0.5em 1em; }
.note { color: #555; }
pre { background: #f6f6f6; padding: 0.8em; white-space: pre-wrap; font-size: 0.85em; }
svg { max-width: 100%; height: auto; }
.hidden { position: absolute; }
.grid { display: grid; gap: 4px; align-items: center; }
.grid span { font-size: 0.85em; overflow-wrap: anywhere; }
.picture { display: block; width: 100%; }
.picture:hover { transform: scale(2); position: relative; z-index: 1; }
.box, .edge { fill: none; vector-effect: non-scaling-stroke; }
.box { stroke-width: 2; pointer-events: all; }
.wrong { stroke-dasharray: 4 3; }
.edge { stroke: #000; stroke-opacity: 0.55; stroke-width: 4; }
dt { font-weight: 600; } dd { margin: 0 0 0.3em 1.5em; }
"""
_DEFINITIONS = {
    "class": "an IoU of 0.5 or more with an object of another class",
    "location": "an IoU of 0.1 to 0.5 with an object of its class",
    "both": "an IoU of 0.1 to 0.5 with an object of another class only",
    "duplicate": "an IoU of 0.5 or more with an object that has a match of higher score",
    "background": "an IoU below 0.1 with every object",
    "missed": "an object that is neither matched nor the target of an error of class or location",
}


def write_page(results: dict, truth: dict, folder: Path, boxes: dict[str, Callable]) -> str:
    """Return the page as HTML.

    Args:
        results: content of `results.json`.
        truth: annotations in COCO format.
        folder: folder of the images.
        boxes: for each row of pictures, a function from an image record to the boxes to draw.
    """
    detectors = results["detectors"]
    with_errors = {name: d for name, d in detectors.items() if d["errors"]}
    parts = [
        f"<h1>{len(detectors)} detectors on equal terms</h1>",
        f'<p class="note">{escape(results["shared"]["data"])}: evaluated on {results["images"]} '
        f"images with {results['objects']} objects. {escape(results['shared']['length'])}.</p>",
        _failures(detectors),
        "<h2>Box AP at the end</h2>",
        _final_table(detectors),
        "<h2>AP over images and over time</h2>",
        ap_chart(detectors),
        '<p class="note">Minutes are computed from the time of a training step below; they exclude '
        "loading and evaluation.</p>",
        _curve_table(detectors),
        "<h2>Speed and size</h2>",
        _cost_table(detectors),
        '<p class="note">Times are medians ± half the interquartile range, measured in turns in '
        "one process after the training. A step is forward, backward and optimiser on one batch. "
        "Memory is the peak of a training process: of the GPU, or without one, of the process. "
        "GMAC are 10<sup>9</sup> multiply-adds for one image; Faster R-CNN is counted for its "
        "largest number of proposals.</p>",
    ]
    if with_errors:
        parts += [
            "<h2>Errors by kind</h2>",
            error_chart(with_errors),
            _error_table(with_errors),
            "<dl>" + "".join(f"<dt>{k}</dt><dd>{_DEFINITIONS[k]}</dd>" for k in KINDS) + "</dl>",
            '<p class="note">The categories are those of TIDE (Bolya et al., ECCV 2020). '
            "Detections are matched with objects of their class at an IoU of 0.5 in the order of "
            "scores. A detection without a match is an error of the first kind that applies, in "
            "the order location, class, duplicate, background, both. The cost of a kind is the "
            "gain in AP50 if only its errors are corrected; the small number counts the errors "
            "that score at least the threshold of the detector's best F1.</p>",
            "<h2>Detections</h2>",
            f"<p>{class_legend(truth)}</p>",
            _pictures(truth, folder, boxes),
            '<p class="note">Boxes that score at least the threshold of the detector\'s best F1, '
            "first seed. Dashed boxes are wrong; hover over a box for its class, score and error."
            "</p>",
        ]
    parts += [
        "<h2>Terms</h2>",
        _table(
            ["shared by all", ""], [[k, escape(v)] for k, v in results["shared"].items()], "text"
        ),
        _terms_table(detectors),
        "<h2>How it was made</h2>",
        "<pre>" + "\n".join(map(escape, results["commands"])) + "</pre>",
        *(f"<p>{escape(text)}</p>" for text in (results["machine"], results["note"]) if text),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Detectors on equal terms</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _name(detectors: dict, name: str) -> str:
    return f'<i style="background:{colour(list(detectors).index(name))}"></i>{escape(name)}'


def _column(values: Sequence[float | None], digits: int, high: bool = True) -> list[str]:
    """Return cells of numbers, empty for None, with the best one in bold unless there is a tie."""
    texts = ["" if value is None else f"{value:.{digits}f}" for value in values]
    known = [float(text) for text in texts if text]
    best = (max if high else min)(known, default=None)
    if len(known) < 2 or known.count(best) > 1:
        return texts
    return [
        f'<span class="best">{text}</span>' if text and float(text) == best else text
        for text in texts
    ]


def _with_small(cells: Sequence[str], small: Sequence[str]) -> list[str]:
    return [
        f'{cell} <span class="spread">{text}</span>' if cell and text else cell
        for cell, text in zip(cells, small, strict=True)
    ]


def _rows(detectors: dict, *columns: Sequence[str]) -> list[list[str]]:
    return [[_name(detectors, n), *c] for n, *c in zip(detectors, *columns, strict=True)]


def _failures(detectors: dict) -> str:
    lines = [
        f"<li>{escape(name)}, seed {run['seed']}: {escape(run['status'])}</li>"
        for name, detector in detectors.items()
        for run in detector["runs"]
        if run["status"] != "finished"
    ]
    return f'<div class="failed">Not finished:<ul>{"".join(lines)}</ul></div>' if lines else ""


def _final_table(detectors: dict) -> str:
    columns, shown = [], []
    for metric in next(iter(detectors.values()))["final"]:
        values = [d["final"][metric] for d in detectors.values()]
        if not any(values):
            continue
        shown.append(metric)
        cells = _column([v and v["mean"] for v in values], 1)
        deviations = [
            f"± {v['deviation']:.1f}" if v and v["deviation"] is not None else "" for v in values
        ]
        columns.append(_with_small(cells, deviations))
    runs = [str(sum(r["status"] == "finished" for r in d["runs"])) for d in detectors.values()]
    table = _table(["detector", *shown, "runs"], _rows(detectors, *columns, runs))
    several = any(count not in "01" for count in runs)
    return table + (
        '<p class="note">Means over the seeds ± standard deviation.</p>'
        if several
        else '<p class="note">One seed: the spread between runs is unknown.</p>'
    )


def _curve_table(detectors: dict) -> str:
    images = sorted({n for d in detectors.values() for r in d["runs"] for n, _ in r["curve"]})

    def mean(detector: dict, at: int) -> float | None:
        found = [ap for run in detector["runs"] for n, ap in run["curve"] if n == at]
        return sum(found) / len(found) if found else None

    columns = [_column([mean(d, at) for d in detectors.values()], 1) for at in images]
    headers = ["AP after images", *(f"{at:,}" for at in images)]
    return _table(headers, _rows(detectors, *columns)) if images else ""


def _cost_table(detectors: dict) -> str:
    def column(key: str, digits: int, scale: float = 1, spread: str = "") -> list[str]:
        values = [d.get(key) for d in detectors.values()]
        cells = _column([None if v is None else v * scale for v in values], digits, high=False)
        if not spread:
            return cells
        shares = [d.get(spread) for d in detectors.values()]
        return _with_small(cells, ["" if s is None else f"± {100 * s:.0f} %" for s in shares])

    return _table(
        ["detector", "inference, ms an image", "training step, s", "memory, GB", "parameters, M"]
        + ["GMAC"],
        _rows(
            detectors,
            column("inference_ms", 1, spread="inference_spread"),
            column("step_s", 3, spread="step_spread"),
            column("peak_mb", 2, 1 / 1024),
            column("parameters_m", 1),
            column("gmac", 2),
        ),
    )


def _error_table(detectors: dict) -> str:
    columns = [
        _with_small(
            [f"{d['errors'][kind]['ap50']:.1f}" for d in detectors.values()],
            [f"{d['errors'][kind]['count']:.0f}" for d in detectors.values()],
        )
        for kind in KINDS
    ]
    names = [f'<i style="background:{ERROR_COLOURS[k]}"></i> {k}' for k in KINDS]
    rows = [[escape(n), *cells] for n, *cells in zip(detectors, *columns, strict=True)]
    return _table(["AP50 gained; count", *names], rows)


def _pictures(truth: dict, folder: Path, boxes: dict[str, Callable]) -> str:
    records = choose(truth)
    cells = []
    for name, boxes_of in boxes.items():
        cells.append(f"<span>{escape(name)}</span>")
        cells += [panel(truth, record, boxes_of(record)) for record in records]
    columns = f"grid-template-columns: 8em repeat({len(records)}, 1fr)"
    grid = f'<div class="grid" style="{columns}">{"".join(cells)}</div>'
    return embedded(records, folder) + grid


def _terms_table(detectors: dict) -> str:
    rows = []
    for name, detector in detectors.items():
        terms = detector["terms"]
        recipe = f"{terms['recipe_rate']:g}, batch {terms['recipe_batch']}"
        rate = f"{terms['rate']:.3g} = {terms['rule']}"
        cells = [terms["optimizer"], recipe, rate, terms["clip"]]
        config = f"<code>{escape(detector['config'])}</code>"
        rows.append([_name(detectors, name), *map(escape, [*cells, terms["start"]]), config])
    headers = ["own", "optimiser", "rate of the recipe", "rate here", "clipping"]
    return _table([*headers, "initial backbone", "configuration"], rows, "text")
