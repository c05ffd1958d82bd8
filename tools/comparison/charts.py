"""Charts of the page, as inline SVG."""

import io
import statistics

from matplotlib import rc_context
from matplotlib.figure import Figure

from .errors import KINDS

__all__ = ["ERROR_COLOURS", "ap_chart", "colour", "error_chart"]

_COLOURS = (  # of Okabe and Ito, suitable for colour-blind readers
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31"),
)
_DASHES = ("-", "--", ":")  # the next one after all colours are used
ERROR_COLOURS = dict(
    zip(KINDS, ("#d55e00", "#e69f00", "#8c6d31", "#cc79a7", "#999999", "#56b4e9"), strict=True)
)


def colour(index: int) -> str:
    """Return the colour of the detector with this index."""
    return _COLOURS[index % len(_COLOURS)]


def ap_chart(detectors: dict[str, dict]) -> str:
    """Plot AP over the number of images and over the training time.

    Lines are means over the seeds; bands are the range. The time is computed from the measured time
    of a step; detectors without it are in the first chart only.

    Args:
        detectors: "detectors" of `results.json`.

    Returns:
        SVG.
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
    """Plot the AP50 that each detector loses by each kind of error, as stacked bars.

    Args:
        detectors: "detectors" of `results.json` that have "errors".

    Returns:
        SVG.
    """
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(detectors)), layout="constrained")
    axis = figure.subplots()
    names = list(detectors)[::-1]
    left = [0.0] * len(names)
    for kind, fill in ERROR_COLOURS.items():
        widths = [max(detectors[name]["errors"][kind]["ap50"], 0) for name in names]
        axis.barh(names, widths, left=left, color=fill, label=kind, height=0.66)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlabel="gain in AP50 if all errors of the kind are corrected")
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False)
    return _svg(figure, "errors")


def _svg(figure: Figure, name: str) -> str:
    """Return the SVG of a figure; `name` makes its ids unique on the page."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    # The hash salt and the missing date make the output reproducible; "none" keeps text as text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
