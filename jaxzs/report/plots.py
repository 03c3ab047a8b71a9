"""Plots of results, one function each; all write a PNG atomically, equal for equal results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxzs.report.results import Confusion, Convergence, Figure, PerClass, Pseudolabels, Reliability

GAIN, LOSS = "#2a7f62", "#b5483a"
_COLOURS = ("#1f5fa8", "#d9822b", "#2a7f62", "#9a4f96", "#7a6a53", "#c2405b", "#4fa3b8", "#8a8a2c")
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":", "-.")
_OBJECTIVE_NOISE = 1e-6  # of float32 objectives made of logits up to 25
_SERIES = 12  # with more, dots of a row cannot be told apart
_NAMED_CLASSES = 60  # with more, names on an axis cannot be read
_COUNTED_CLASSES = 15  # with more, counts in the cells of a matrix cannot be read


def plot_figures(path: str | Path, figures: Sequence[Figure], published: Sequence[Figure] = ()) -> None:
    """Accuracy by method of one data set: a dot a number, a hollow one where it is published. All in percent."""
    figure, axes = _canvas(7.5, 1.6 + 0.32 * len({one.method for one in figures}))
    methods = list(dict.fromkeys(one.method for one in figures))
    series = list(dict.fromkeys((one.figure, one.protocol) for one in (*figures, *published)))
    if len(series) > _SERIES:  # of many settings and measures the first measure alone
        figures = [one for one in figures if one.figure == figures[0].figure]
        series = list(dict.fromkeys((one.figure, one.protocol) for one in (*figures, *published)))
    for number, of in enumerate(series):
        # Series lie side by side, within 0.6 of the row of their method.
        shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
        for shown, hollow in ((figures, False), (published, True)):
            own = [one for one in shown if (one.figure, one.protocol) == of]
            if not own:
                continue
            label = ", ".join(filter(None, of)) + (" (published)" if hollow else "")
            colour = _COLOURS[number % len(_COLOURS)]
            axes.errorbar(
                [one.value for one in own],
                [methods.index(one.method) + shift for one in own],
                xerr=[one.deviation or 0.0 for one in own],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=colour,
                markerfacecolor="white" if hollow else colour,
                markersize=8 if hollow else 5,
                zorder=1 if hollow else 2,  # what was measured lies above what was published
                label=label,
            )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top
    axes.set_xlabel("%")
    axes.grid(axis="x", linewidth=0.4)
    axes.set_title(figures[0].data, fontsize=10)
    if len(series) <= _SERIES:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    else:
        axes.set_title(f"{figures[0].data}: {figures[0].figure}, a dot a setting", fontsize=10)
    _save(figure, path)


def plot_per_class(path: str | Path, result: PerClass) -> None:
    """Change of every class against zero-shot in points, the poorest class first (the "Robin Hood" plot)."""
    order = sorted(range(len(result.classes)), key=lambda c: result.zero_shot[c])
    gain = [result.accuracy[c] - result.zero_shot[c] for c in order]
    named = len(order) <= _NAMED_CLASSES
    figure, axes = _canvas(max(4.0, 0.35 * len(order) + 2) if named else 12.0, 3.6)  # inches
    axes.bar(range(len(order)), gain, color=[GAIN if g >= 0 else LOSS for g in gain])
    axes.axhline(0, color="black", linewidth=0.8)
    if not any(gain):
        axes.set_ylim(-1, 1)  # else the scale would be of hundredths of a point
    if named:
        names = [f"{result.classes[c]} ({result.zero_shot[c]:.0f})" for c in order]
        axes.set_xticks(range(len(order)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("change in accuracy, points")
    axes.set_xlabel(f"class{' (zero-shot accuracy, %)' if named else ''}, poorest first")
    _title(axes, result.data, f"{result.method} against zero-shot", result.protocol)
    _save(figure, path)


def plot_confusion(path: str | Path, result: Confusion) -> None:
    """Images of each true class (rows) by the class they were given (columns), as a share of the row."""
    import numpy as np

    names = sorted({*result.truth, *result.predicted})
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for true, predicted, images in zip(result.truth, result.predicted, result.images, strict=True):
        counts[place[true], place[predicted]] += images
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a class that was only predicted has no images
    named = len(names) <= _NAMED_CLASSES
    side = max(3.5, 0.28 * len(names) + 1.5) if named else 9.0  # inches
    figure, axes = _canvas(side, side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if named:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= _COUNTED_CLASSES:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                shade = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{number:.0f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xlabel("given")
    axes.set_ylabel("true")
    _title(axes, result.data, f"confusion, {result.method}", result.protocol)
    _save(figure, path)


def plot_reliability(path: str | Path, curves: Sequence[Reliability]) -> None:
    """Accuracy over confidence, a dot a bin, as large as its share of the images; on the diagonal where honest."""
    figure, axes = _canvas(5.0, 5.0)
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":")
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        pairs = zip(curve.share, curve.confidence, curve.accuracy, strict=True)
        error = sum(share * abs(sure - right) / 100 for share, sure, right in pairs)
        label = f"{curve.method}, {error:.1f} % off"
        axes.plot(curve.confidence, curve.accuracy, color=colour, linewidth=1.2, label=label)
        sizes = [4 + 2 * share for share in curve.share]
        axes.scatter(curve.confidence, curve.accuracy, s=sizes, color=colour, marker=_MARKERS[number % len(_MARKERS)])
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.grid(linewidth=0.4)
    axes.legend(frameon=False, fontsize=8)
    _title(axes, curves[0].data, "reliability", curves[0].protocol)
    _save(figure, path)


def plot_convergence(path: str | Path, curves: Sequence[Convergence]) -> None:
    """Objective above the lowest one that any solver reached with the same labels, over passes; logarithmic."""
    figure, axes = _canvas(6.0, 4.0)
    lowest: dict[str, float] = {}
    for curve in curves:
        lowest[curve.labels] = min(*curve.objective, lowest.get(curve.labels, float("inf")))
    labels = list(dict.fromkeys(curve.labels for curve in curves))
    methods = list(dict.fromkeys(curve.method for curve in curves))
    for curve in curves:
        # The lowest itself would be at minus infinity on this axis.
        gaps = [max(value - lowest[curve.labels], _OBJECTIVE_NOISE) for value in curve.objective]
        number = methods.index(curve.method)
        axes.plot(
            [max(passes, 0.5) for passes in curve.passes],  # a place for pass 0
            gaps,
            color=_COLOURS[labels.index(curve.labels) % len(_COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            markevery=[0, len(gaps) - 1],  # its two ends
            linewidth=1.4,
            label=", ".join(filter(None, (curve.labels, curve.method))),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("passes over the features")
    axes.set_ylabel("objective above the lowest reached")
    axes.grid(linewidth=0.4)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{curves[0].data}: proxy solvers", fontsize=9)
    _save(figure, path)


def plot_pseudolabels(path: str | Path, curves: Sequence[Pseudolabels]) -> None:
    """K against the accuracy of the pseudolabels, an iteration a point: where K grows (GRIP), or else all."""
    figure, axes = _canvas(7.5, 4.0)
    curves = [curve for curve in curves if len(set(curve.k)) > 1] or curves
    methods = list(dict.fromkeys(curve.method for curve in curves))
    protocols = list(dict.fromkeys(curve.protocol for curve in curves))
    for curve in curves:
        number = protocols.index(curve.protocol)
        axes.plot(
            curve.k,
            curve.accuracy,
            color=_COLOURS[methods.index(curve.method) % len(_COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.4,
            label=", ".join(filter(None, (curve.method, curve.protocol))),
        )
    axes.set_xlabel("K, pseudolabels per class")
    axes.set_ylabel("pseudolabels that are right, %")
    axes.grid(linewidth=0.4)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set_title(f"{curves[0].data}: pseudolabels", fontsize=9)
    _save(figure, path)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, in inches, without pyplot: no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # it attaches itself to the figure
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _title(axes: Any, data: str, what: str, protocol: str) -> None:
    title = ", ".join(filter(None, (what, protocol)))
    axes.set_title(": ".join(filter(None, (data, title))), fontsize=9)


def _save(figure: Any, path: str | Path) -> None:
    from matplotlib.text import Text

    from jaxzs.files import atomic_path

    for text in figure.findobj(Text):
        if text.get_text():  # names; numbers at an axis, powers of ten among them, are written when it is drawn
            text.set_parse_math(False)  # a name between two dollar signs is no formula
    with atomic_path(path) as temporary:
        # The version of matplotlib stays out: equal results are equal bytes.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
