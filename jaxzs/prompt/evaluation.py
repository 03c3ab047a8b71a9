"""Evaluation as in arXiv 2306.01669: accuracy, seen and unseen classes with their harmonic mean, and who gains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxzs.errors import DataError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Fractions in [0,1]. accuracy: of all images. seen, unseen: of images of those classes, each predicted among all
    classes; harmonic_mean: 2su/(s+u). The last three are None without seen classes."""

    accuracy: float
    seen: float | None = None
    unseen: float | None = None
    harmonic_mean: float | None = None

    @property
    def headline(self) -> float:
        """What the paper reports: the harmonic mean in TRZSL, the accuracy elsewhere."""
        return self.accuracy if self.harmonic_mean is None else self.harmonic_mean


def evaluate(predictions: np.ndarray, labels: np.ndarray, seen: np.ndarray | None = None) -> Evaluation:
    """Accuracy of predicted classes: [N] and [N] integers; seen: the seen classes, for TRZSL.

    Raises `DataError` for lengths that differ, no images, or a group without images.

    >>> result = prompt.evaluate(np.array([0, 1, 1]), np.array([0, 1, 2]), seen=np.array([0, 2]))
    >>> result.seen, result.unseen, round(result.harmonic_mean, 3)
    (0.5, 1.0, 0.667)
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise DataError(f"predictions {predictions.shape} and labels {labels.shape} must be [N] with N >= 1")
    right = predictions == labels
    if seen is None:
        return Evaluation(float(right.mean()))
    is_seen = np.isin(labels, seen)
    if is_seen.all() or not is_seen.any():
        raise DataError("the test images are all of seen or all of unseen classes; TRZSL needs both")
    s, u = float(right[is_seen].mean()), float(right[~is_seen].mean())
    return Evaluation(float(right.mean()), s, u, 2 * s * u / (s + u) if s + u else 0.0)


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
    >>> analysis = prompt.robin_hood(np.array([0, 0, 1, 1, 2, 0, 0, 0]), labels, labels)
    >>> analysis.classes.tolist(), analysis.bottom_gain, analysis.top_gain  # poorest class first
    ([3, 2, 0, 1], 1.0, 0.0)
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    if len(present) < 2:
        raise DataError("the per-class analysis needs images of at least two classes")
    before, after = (
        np.array([(np.asarray(p)[labels == c] == c).mean() for c in present])
        for p in (zero_shot_predictions, tuned_predictions)
    )
    order = np.argsort(before, kind="stable")
    before, after = before[order], after[order]
    gain, quarter = after - before, max(1, len(present) // 4)
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


def plot_robin_hood(analysis: RobinHood, class_names: Any, path: str | Path) -> None:
    """Bars of per-class change, poorest class first, written as a PNG file.

    >>> labels = np.repeat(np.arange(4), 2)
    >>> analysis = prompt.robin_hood(np.array([0, 0, 1, 1, 2, 0, 0, 0]), labels, labels)
    >>> prompt.plot_robin_hood(analysis, ["cat", "dog", "cow", "hen"], "classes.png")
    >>> data.open_image("classes.png").size
    (480, 432)
    """
    from jaxzs.report import PerClass
    from jaxzs.report.plots import plot_per_class

    percent = lambda fractions: tuple((100 * fractions).tolist())  # noqa: E731
    names = tuple(class_names[c] for c in analysis.classes)
    before, after = percent(analysis.zero_shot), percent(analysis.tuned)
    slope = f"slope {analysis.slope:+.2f}"
    plot_per_class(path, PerClass("", "tuned prompt", names, before, after, slope))
