"""Figures for the reports: SVG that takes its ink from the page, so that it suits light and dark.

Drawn with matplotlib's object interface only, never pyplot: no global state, no window system, any thread.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from pipelines.evaluating.calibration import Reliability

# Stands for the page's text colour while matplotlib draws; SVG calls that currentColor.
_INK = "#010203"
_COLOURS = ("#2a7f9e", "#d9822b", "#6b8e23", "#a05195", "#c0392b", "#7f8c8d")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=_COLOURS),
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
_MAX_HEATMAP_NUMBERS = 20


def bars(values: Mapping[str, float] | Mapping[str, Sequence[float]], label: str, series: Sequence[str] = ()) -> str:
    """Horizontal bars, one group for each key, from top to bottom; `series` names a group's bars."""
    groups = {name: (v if isinstance(v, Sequence) else [v]) for name, v in values.items()}
    width = max((len(v) for v in groups.values()), default=1)
    with mpl.rc_context(_STYLE):
        axes = _axes(height=0.8 + 0.28 * max(1, len(groups)) * max(1.0, 0.6 * width))
        at = np.arange(len(groups))
        for position in range(width):
            heights = [v[position] for v in groups.values()]
            name = series[position] if series else None
            axes.barh(at + (position - (width - 1) / 2) * 0.8 / width, heights, 0.8 / width, label=name)
        axes.set_yticks(at, [_short(name) for name in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x")
        if series:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=width, borderaxespad=0)
        return _svg(axes)


def histogram(values: npt.ArrayLike, label: str, bins: int = 40, marks: Mapping[str, float] | None = None) -> str:
    """How many values fall where; `marks` are named vertical lines."""
    with mpl.rc_context(_STYLE):
        axes = _axes(height=2.6)
        axes.hist(np.asarray(values), bins=bins)
        return _finish_histogram(axes, label, marks or {})


def counted_histogram(edges: Sequence[float], counts: Sequence[float], label: str) -> str:
    """A histogram that was counted elsewhere: `counts` between neighbouring `edges` (one more than counts)."""
    with mpl.rc_context(_STYLE):
        axes = _axes(height=2.6)
        axes.stairs(counts, edges, fill=True)
        return _finish_histogram(axes, label, {})


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, marks: Sequence[float] = ()
) -> str:
    """Lines through the (x, y) points of each series; a dashed one upright at each of the `marks`."""
    with mpl.rc_context(_STYLE):
        axes = _axes(height=3.0)
        for name, points in series.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) <= 12 else None, markersize=4)
        for mark in marks:
            axes.axvline(mark, color=_COLOURS[4], linewidth=1, linestyle="--")
        return _finish_series(axes, x_label, y_label, len(series))


def scores(series: Mapping[str, Sequence[tuple[Any, float]]], x_label: str, y_label: str, *, log: bool = False) -> str:
    """Points (value, score) of each series; values that are no numbers stand side by side."""
    with mpl.rc_context(_STYLE):
        axes = _axes(height=2.8)
        every = [x for points in series.values() for x, _ in points]
        named = [] if all(map(_is_number, every)) else sorted(set(map(str, every)))
        for name, points in series.items():
            x, y = zip(*points, strict=True) if points else ((), ())
            places = [named.index(str(value)) if named else value for value in x]
            axes.scatter(places, y, label=name, s=22, alpha=0.85)
        if named:
            axes.set_xticks(range(len(named)), [_short(name) for name in named])
        elif log:
            axes.set_xscale("log")
        return _finish_series(axes, x_label, y_label, len(series))


def parallel_coordinates(
    names: Sequence[str], log: Sequence[bool], lines: Sequence[tuple[Sequence[Any], float]], y_label: str
) -> str:
    """A line for each (values, score) through an upright axis for each name, the last one the score's own."""
    values = [[*given, score] for given, score in lines]
    logs = [*log, False]
    best, worst = max(score for _, score in lines), min(score for _, score in lines)
    with mpl.rc_context(_STYLE):
        axes = _axes(height=3.2)
        places, bounds = [], []
        for position, logarithmic in enumerate(logs):
            column = [row[position] for row in values]
            named = sorted({str(value) for value in column}) if not all(map(_is_number, column)) else []
            numbers = [named.index(str(v)) if named else math.log10(v) if logarithmic else float(v) for v in column]
            low, high = min(numbers), max(numbers)
            places.append([(number - low) / (high - low) if high > low else 0.5 for number in numbers])
            bounds.append((min(column, key=str), max(column, key=str)) if named else (min(column), max(column)))
        for row in np.argsort([score for _, score in lines]).tolist():
            shade = (lines[row][1] - worst) / (best - worst) if best > worst else 1.0
            axes.plot([column[row] for column in places], color=_COLOURS[0], alpha=0.15 + 0.85 * shade, linewidth=1.6)
        for position, (low, high) in enumerate(bounds):
            axes.axvline(position, color=_INK, linewidth=0.8, alpha=0.5)
            for height, value, side in ((0, low, "top"), (1, high, "bottom")):
                text = f"{value:.3g}" if _is_number(value) else _short(str(value))
                axes.annotate(
                    text,
                    (position, height),
                    (0, -4 if side == "top" else 4),
                    textcoords="offset points",
                    ha="center",
                    va=side,
                    fontsize=8,
                )
        axes.set_xticks(range(len(logs)), [_short(name) for name in [*names, y_label]])
        axes.set_yticks([])
        axes.set_ylim(-0.15, 1.15)
        axes.spines[["left", "bottom"]].set_visible(False)
        return _svg(axes)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def confusion_matrix(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    """Shares of each label's texts by prediction, one row a label; with the counts where they can be read."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = len(classes)
    edge = min(9.0, 2.4 + 0.42 * size)
    with mpl.rc_context(_STYLE):
        axes = _axes(height=edge, width=edge + 0.6)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        font = 9 if size <= _MAX_HEATMAP_NUMBERS else max(3.0, 9 * _MAX_HEATMAP_NUMBERS / size)
        names = [_short(name) for name in classes]
        axes.set_xticks(range(size), names, rotation=90 if size > 4 else 0, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")
        if size <= _MAX_HEATMAP_NUMBERS:
            for row, column in np.ndindex(size, size):
                colour = "#ffffff" if shares[row, column] > 0.5 else "#1b1f24"
                count = f"{matrix[row, column]:,}"
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
        return _svg(axes)


def reliability_diagram(before: Reliability, after: Reliability | None) -> str:
    """How often predictions are right against how sure the classifier is, before and after temperature scaling."""
    with mpl.rc_context(_STYLE):
        axes = _axes(height=3.8, width=4.6)
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.4, linestyle="--", linewidth=1)
        for name, found in (("as trained", before), ("with temperature", after)):
            if found is not None:
                full = found.count > 0
                sizes = 10 + 120 * np.sqrt(found.count[full] / found.count.sum())
                (line,) = axes.plot(found.confidence[full], found.frequency[full], linewidth=1.2, alpha=0.7)
                label = f"{name}, error {found.error:.3f}"
                points = found.confidence[full], found.frequency[full]
                axes.scatter(*points, s=sizes, color=line.get_color(), label=label, alpha=0.8)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="probability given", ylabel="share that is right")
        axes.grid()
        legend = axes.legend(loc="upper left", fontsize=9)
        for handle in legend.legend_handles:
            handle.set_sizes([30])
        return _svg(axes)


def _finish_series(axes: Axes, x_label: str, y_label: str, count: int) -> str:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid()
    if count > 1:
        axes.legend()
    return _svg(axes)


def _finish_histogram(axes: Axes, label: str, marks: Mapping[str, float]) -> str:
    for index, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color=_COLOURS[1 + index % (len(_COLOURS) - 1)], linewidth=1.2, label=name)
    if marks:
        axes.legend()
    axes.set_xlabel(label)
    axes.grid(axis="y")
    return _svg(axes)


def _axes(height: float, width: float = 7.0) -> Any:
    return Canvas(figsize=(width, height), layout="constrained").add_subplot()


def _svg(axes: Any) -> str:
    buffer = io.StringIO()
    canvas = axes.figure
    # A fixed salt and no date: equal data give an equal file.
    with mpl.rc_context({"svg.hashsalt": "shoal"}), warnings.catch_warnings():
        # Measuring text in a script that matplotlib's own font lacks; the browser has one for it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return re.sub(_INK, "currentColor", svg[svg.index("<svg") :])


def _short(name: str, limit: int = 28) -> str:
    # `$` would start a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= limit else name[: math.ceil(limit / 2)] + "…" + name[-limit // 2 + 1 :]
