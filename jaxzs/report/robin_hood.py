"""Who gains by tuning: the poor classes or the rich ones (the "Robin Hood" effect of arXiv 2306.01669)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxzs.errors import DataError
from jaxzs.report.plots import plot_per_class
from jaxzs.report.results import PerClass


@dataclasses.dataclass(frozen=True)
class RobinHood:
    """Whether tuning gives to the poor classes or to the rich ones.

    classes: the C' classes with test images, poorest under zero-shot CLIP first. zero_shot, tuned: their accuracy [C'].
    bottom_gain, top_gain: mean change over the poorest and the richest quarter. deviation_zero_shot,
    deviation_tuned: standard deviation of the per-class accuracies. slope: of a straight line through gain against
    zero-shot accuracy; below 0, the poor gain most.
    """

    classes: np.ndarray
    zero_shot: np.ndarray
    tuned: np.ndarray
    bottom_gain: float
    top_gain: float
    deviation_zero_shot: float
    deviation_tuned: float
    slope: float


def robin_hood(zero_shot_predictions: np.ndarray, tuned_predictions: np.ndarray, labels: np.ndarray) -> RobinHood:
    """Per-class analysis of arXiv 2306.01669 (section 4 and its "Robin Hood" effect); predictions and labels [N].

    Raises `DataError` with fewer than two classes.

    >>> labels = np.repeat(np.arange(4), 2)
    >>> analysis = report.robin_hood(np.array([0, 0, 1, 1, 2, 0, 0, 0]), labels, labels)
    >>> analysis.classes.tolist(), analysis.bottom_gain, analysis.top_gain  # poorest class first
    ([3, 2, 0, 1], 1.0, 0.0)
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    if len(present) < 2:
        raise DataError("the per-class analysis needs images of at least two classes")
    for predictions in (zero_shot_predictions, tuned_predictions):
        if np.shape(predictions) != labels.shape:
            raise DataError(f"predictions {np.shape(predictions)} and labels {labels.shape} differ in number")
    before, after = (
        np.array([(np.asarray(p)[labels == c] == c).mean() for c in present])  # recall of each class that has images
        for p in (zero_shot_predictions, tuned_predictions)
    )
    order = np.argsort(before, kind="stable")  # the poorest class first
    before, after = before[order], after[order]
    gain, quarter = after - before, max(1, len(present) // 4)  # a quarter of the classes, one at least
    # Least squares of gain on zero-shot accuracy: with a slope below 0 the poor gain more.
    centred = before - before.mean()
    spread = float((centred**2).sum())
    return RobinHood(
        present[order],
        before,
        after,
        float(gain[:quarter].mean()),
        float(gain[-quarter:].mean()),
        float(before.std()),
        float(after.std()),
        float((centred * gain).sum() / spread) if spread else 0.0,
    )


def plot_robin_hood(analysis: RobinHood, class_names: Sequence[str], path: str | Path) -> None:
    """Bars of per-class change, poorest class first, written as a PNG file.

    >>> labels = np.repeat(np.arange(4), 2)
    >>> analysis = report.robin_hood(np.array([0, 0, 1, 1, 2, 0, 0, 0]), labels, labels)
    >>> report.plot_robin_hood(analysis, ["cat", "dog", "cow", "hen"], "classes.png")
    >>> data.open_image("classes.png").size
    (480, 432)
    """
    percent = lambda fractions: tuple((100 * fractions).tolist())  # noqa: E731
    names = tuple(class_names[c] for c in analysis.classes)
    before, after = percent(analysis.zero_shot), percent(analysis.tuned)
    slope = f"slope {analysis.slope:+.2f}"
    plot_per_class(path, PerClass("", "tuned prompt", names, before, after, slope))
