"""Evaluation as in arXiv 2306.01669: accuracy, seen and unseen classes with their harmonic mean."""

from __future__ import annotations

import dataclasses

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
    _check_classes(predictions, labels)
    right = predictions == labels  # [N]
    if seen is None:
        return Evaluation(float(right.mean()))
    is_seen = np.isin(labels, seen)  # [N]
    if is_seen.all() or not is_seen.any():
        raise DataError("the test images are all of seen or all of unseen classes; TRZSL needs both")
    s, u = float(right[is_seen].mean()), float(right[~is_seen].mean())  # every image counts the same, not every class
    # Both 0: the mean is 0, where its formula divides by 0.
    return Evaluation(float(right.mean()), s, u, 2 * s * u / (s + u) if s + u else 0.0)


def _check_classes(*lists: np.ndarray) -> None:
    """`DataError` unless all hold classes: whole numbers from 0, equally many."""
    for values in lists:
        if values.shape != lists[0].shape or not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
            raise DataError(f"predictions and labels must be classes [{len(lists[0])}], whole numbers from 0")
