"""Metrics of multi-label tagging: average precision and F1, as TagCLIP's code and as scikit-learn define them.

N images, C classes; labels are 0 or 1, tags bool. Everything is NumPy on the host.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError, LabelError


class F1(NamedTuple):
    """F1, precision and recall, each 0 to 1; f1 is 0 when both others are (TagCLIP's code has NaN there)."""

    f1: float
    precision: float
    recall: float


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over the positives of the precision at their rank: scores, labels [N,C] -> [C] float64.

    No interpolation; equal scores keep the order of the images; 0 for a class without positives (TagCLIP's code).
    `sklearn.metrics.average_precision_score` differs only in equal scores, which it treats as one threshold.

    >>> average_precision(np.array([[0.9], [0.8], [0.1]]), np.array([[1], [0], [1]])).round(3).tolist()
    [0.833]
    """
    scores, positive = _checked(scores, labels)
    order = np.argsort(-scores, axis=0, kind="stable")  # [N,C]
    hits = np.take_along_axis(positive, order, axis=0)  # [N,C], true or not by rank
    precision = np.cumsum(hits, axis=0) / np.arange(1, len(hits) + 1)[:, None]  # [N,C] at every rank
    return (precision * hits).sum(0) / np.maximum(hits.sum(0), 1)


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `average_precision` over all classes; one without positives counts as 0 (TagCLIP's code).

    Raises `LabelError` when no class has any: there is nothing to evaluate.
    """
    scores, positive = _checked(scores, labels)
    _check_positives(positive)
    return float(average_precision(scores, labels).mean())


def f1(tags: np.ndarray, labels: np.ndarray, average: str = "overall") -> F1:
    """F1 as TagCLIP's code has it: tags, labels [N,C] -> `F1`.

    average: "overall" counts over images and classes; "category" and "sample" average precision and recall over
    classes or images first and form F1 from the averages (scikit-learn averages the F1s instead).
    """
    axes: dict[str, tuple[int, ...]] = {"overall": (0, 1), "category": (0,), "sample": (1,)}
    if average not in axes:
        raise DataError(f"average must be one of {', '.join(axes)}, got {average!r}")
    tagged, positive = _checked(tags, labels)
    tagged = _decided(tagged)
    true = (tagged & positive).sum(axes[average])
    precision = (true / (tagged.sum(axes[average]) + 1e-9)).mean()
    recall = (true / (positive.sum(axes[average]) + 1e-9)).mean()
    both = precision + recall
    score = 2 * precision * recall / both if both > 0 else 0.0
    return F1(float(score), float(precision), float(recall))


def calibrate_thresholds(scores: np.ndarray, labels: np.ndarray, *, default: float = 0.5) -> np.ndarray:
    """The relative threshold of each class that gives it the best F1: scores, labels [N,C] -> [C] float32.

    For `tag_threshold`; needs labelled images other than those that are tagged, and is not in the paper. Scores are
    put on each image's own 0 to 1 first, as tagging does. Classes without positives get `default`.
    """
    scores, positive = _checked(scores, labels)
    lowest, highest = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    relative = (scores - lowest) / np.where(highest > lowest, highest - lowest, 1.0)
    order = np.argsort(-relative, axis=0, kind="stable")
    ranked = np.take_along_axis(relative, order, axis=0)
    hits = np.cumsum(np.take_along_axis(positive, order, axis=0), axis=0)
    count = np.arange(1, len(scores) + 1)[:, None]
    score = 2 * hits / (count + positive.sum(0)[None, :])  # F1 of taking the first `count` images
    below = np.concatenate([ranked[1:], np.zeros_like(ranked[:1])])  # [N,C], the next lower score
    score = np.where(ranked > below, score, -1.0)  # no threshold separates equal scores
    best = score.argmax(0)
    classes = np.arange(scores.shape[1])
    threshold = (ranked[best, classes] + below[best, classes]) / 2
    return np.where(positive.any(0), threshold, default).astype(np.float32)


def tag_report(scores: np.ndarray, tags: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Every figure at once, as plain numbers: mAP and F1 by both definitions, and per class.

    Keys ending in "_sklearn" are scikit-learn's: mAP over the classes that have positives, and its micro, macro and
    samples F1. The micro F1 equals the overall one.
    Raises `LabelError` for names that repeat or do not fit, and for labels without a single positive.
    """
    from sklearn.metrics import average_precision_score, f1_score

    scores, positive = _checked(scores, labels)
    tags = _decided(_checked(tags, labels)[0])
    _check_names(class_names, scores.shape[1])
    _check_positives(positive)
    per_class = average_precision(scores, labels)
    present = positive.any(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes nobody tagged
        by_class = f1_score(positive, tags, average=None, zero_division=0)
        sklearn = {
            f"f1_{name}_sklearn": float(f1_score(positive, tags, average=name, zero_division=0))
            for name in ("micro", "macro", "samples")
        }
        ties = average_precision_score(positive[:, present], scores[:, present], average=None)
    return {
        "images": len(scores),
        "mAP": float(per_class.mean()),
        "mAP_sklearn": float(np.mean(ties)),
        **{f"f1_{name}": f1(tags, labels, name)._asdict() for name in ("overall", "category", "sample")},
        **sklearn,
        "tags_per_image": float(np.asarray(tags).sum(1).mean()),
        "per_class": {
            name: {"ap": float(ap), "f1": float(score), "positives": int(count)}
            for name, ap, score, count in zip(class_names, per_class, by_class, positive.sum(0), strict=True)
        },
    }


def segmentation_report(
    predicted: Iterable[np.ndarray], truth: Iterable[np.ndarray], class_names: Sequence[str], *, void: int = 255
) -> dict[str, Any]:
    """Mean intersection over union of label maps: [H,W] integers, each pair read once and forgotten -> figures.

    One confusion matrix of all pixels; pixels whose true label is `void` are ignored. mIoU is the mean over
    the classes that have true pixels; a class that occurs in neither has no IoU (None).
    Raises `LabelError` for labels outside of the classes, `DataError` for maps that do not fit, or nothing to compare.
    """
    C = len(class_names)
    _check_names(class_names, C)
    counts, images = np.zeros((C, C), np.int64), 0
    for one, true in itertools.zip_longest(predicted, truth):
        if one is None or true is None:
            more, fewer = ("true", "predicted") if one is None else ("predicted", "true")
            raise DataError(f"there are more {more} label maps than {fewer} ones")
        one, true = _labels("a label map", one), _labels("a true label map", true)
        if one.shape != true.shape:
            raise DataError(f"a label map is {one.shape}, its true one {true.shape}")
        known = true != void
        for name, labels in (("predicted", one[known]), ("true", true[known])):
            if labels.size and not 0 <= labels.min() <= labels.max() < C:
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise LabelError(f"{name} labels must be 0 to {C - 1}, or {void} where nothing is known; found {wrong}")
        images += 1
        counts += np.bincount(C * true[known] + one[known], minlength=C * C).reshape(C, C)
    if not counts.any():
        raise DataError("no pixel has a true label: there is nothing to compare")
    both = np.diag(counts)
    union = counts.sum(1) + counts.sum(0) - both
    with np.errstate(invalid="ignore"):
        iou = both / union
    return {
        "images": images,
        "mIoU": float(iou[counts.sum(1) > 0].mean()),
        "pixel_accuracy": float(both.sum() / counts.sum()),
        "per_class": {
            name: float(value) if total else None for name, value, total in zip(class_names, iou, union, strict=True)
        },
    }


def _labels(name: str, labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise LabelError(f"{name} is {labels.dtype}, expected whole numbers")
    return labels.astype(np.int64)


def _decided(tags: np.ndarray) -> np.ndarray:
    if not np.isin(tags, (0, 1)).all():
        raise DataError("tags must be decisions, 0 or 1; scores have to be compared with a threshold first")
    return tags.astype(bool)


def _check_names(class_names: Sequence[str], num_classes: int) -> None:
    """Names are the keys of a report: one that repeats would take another's place."""
    if len(class_names) != num_classes or not num_classes:
        raise LabelError(f"{len(class_names)} class names for scores of {num_classes} classes")
    if repeated := sorted({name for name in class_names if list(class_names).count(name) > 1}):
        raise LabelError(f"class names occur more than once: {', '.join(repeated)}")


def _check_positives(positive: np.ndarray) -> None:
    if not positive.any():
        raise LabelError("no image has any of the classes: there is nothing to evaluate")


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape or 0 in scores.shape:
        raise DataError(f"scores {scores.shape} and labels {labels.shape} must be [N,C] of the same N and C, not 0")
    if not np.isin(labels, (0, 1)).all():
        raise LabelError("labels must be 0 or 1, one column a class")
    if scores.dtype.kind in "biu":
        scores = scores.astype(np.float64)  # without a sign, the negative of 0 would be the best rank
    elif not jnp.issubdtype(scores.dtype, jnp.floating):
        raise DataError(f"scores are {scores.dtype}, expected real numbers")
    if not np.isfinite(scores).all():
        raise DataError(f"scores of image {int(np.argwhere(~np.isfinite(scores))[0, 0])} are not finite")
    return scores, labels.astype(bool)
