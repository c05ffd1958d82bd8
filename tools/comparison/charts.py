"""The charts of a page, as SVG that stands in HTML."""

import io
import statistics

from matplotlib import rc_context
from matplotlib.figure import Figure

from .errors import KINDS

__all__ = ["ERROR_COLOURS", "ap_chart", "colour", "error_chart"]

_COLOURS = (  # of Okabe and Ito, which colour-blind people can tell apart
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31"),
)
_DASHES = ("-", "--", ":")  # for more detectors than colours
ERROR_COLOURS = dict(
    zip(KINDS, ("#d55e00", "#e69f00", "#8c6d31", "#cc79a7", "#999999", "#56b4e9"), strict=True)
)


def colour(index: int) -> str:
    """Of the detector in this place."""
    return _COLOURS[index % len(_COLOURS)]


def ap_chart(detectors: dict[str, dict]) -> str:
    """AP over images seen, and over the time of training, as SVG.

    Lines are means over the seeds, bands from the lowest to the highest. Times are the images seen
    by the measured time of a step; a detector without one has a line in the first chart only.

    Args:
        detectors: of `results.json`.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for index, (name, detector) in enumerate(detectors.items()):
        style = {
            "color": colour(index),
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        }
        points: dict[int, list[float]] = {}
        for run in detector["runs"]:
            for images, ap in run["curve"]:
                points.setdefault(images, []).append(ap)
        images = sorted(points)
        means = [statistics.fmean(points[n]) for n in images]
        if not images:
            continue
        scales = [1.0]
        if "step_s" in detector:
            scales.append(detector["step_s"] / detector["batch"] / 60)
        for axis, scale in zip(axes, scales, strict=False):
            x = [n * scale for n in images]
            axis.plot(x, means, marker="o", markersize=4, label=name, **style)
            low, high = ([limit(points[n]) for n in images] for limit in (min, max))
            if low != high:
                axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    for axis, label in zip(axes, ("images seen", "minutes of training"), strict=True):
        axis.set(xlabel=label, ylabel="AP")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _svg(figure, "ap")


def error_chart(detectors: dict[str, dict]) -> str:
    """The AP50 that each kind of error costs each detector, as stacked bars in SVG.

    Args:
        detectors: of `results.json`, those with "errors".
    """
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(detectors)), layout="constrained")
    axis = figure.subplots()
    names = list(detectors)[::-1]
    left = [0.0] * len(names)
    for kind, fill in ERROR_COLOURS.items():
        widths = [max(detectors[name]["errors"][kind]["ap50"], 0) for name in names]
        axis.barh(names, widths, left=left, color=fill, label=kind, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlabel="AP50 gained where all errors of the kind are mended")
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False)
    return _svg(figure, "errors")


def _svg(figure: Figure, name: str) -> str:
    """Text stays text; `name` keeps the ids of two charts on one page apart."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    # The same numbers are the same picture.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
