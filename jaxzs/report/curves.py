"""From what solvers and trainings return to the curves of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.report.results import Confusion, Convergence, Figure, PerClass, Pseudolabels, Reliability

if TYPE_CHECKING:
    from jaxzs.prompt import Evaluation, Record
    from jaxzs.proxy import ProxyResult

_POINTS = 60  # of a curve that is kept; a plot shows no more


def convergence(data: str, method: str, result: ProxyResult, labels: str = "") -> Convergence:
    """Histories of a proxy solver over passes, thinned to what a plot with a logarithmic axis shows.

    Entry i of "reference" is after i passes; steps of "fast" cost about the same, the last one is after all.
    """
    objective, norm = np.asarray(result.objective), np.asarray(result.gradient_norm)
    total = float(result.passes)
    steps, first = len(objective) - 1, 0.0  # "reference": entry i is after pass i
    if steps != total:  # "fast": starts with a pass, and repeats its last entry after an early stop
        changed = np.flatnonzero(np.diff(objective) != 0)
        steps, first = int(changed[-1]) + 1 if len(changed) else 0, min(1.0, total)
    passes = np.linspace(first, total, steps + 1)
    # Evenly on a logarithmic axis; the first places coincide and count once.
    chosen = np.unique(np.round(np.geomspace(1, steps + 1, _POINTS)).astype(int) - 1)
    return Convergence(
        data,
        method,
        tuple(passes[chosen].round(2).tolist()),
        tuple(objective[chosen].astype(float).tolist()),
        tuple(norm[chosen].astype(float).tolist()),
        labels,
    )


def evaluated(data: str, method: str, runs: Sequence[Evaluation], protocol: str) -> Figure:
    """What the paper reports of some runs: harmonic mean in TRZSL, accuracy elsewhere; mean and deviation."""
    values = [100 * run.headline for run in runs]
    kind = "accuracy" if runs[0].harmonic_mean is None else "harmonic mean"
    # Over these runs themselves, not an estimate for others.
    deviation = float(np.std(values)) if len(values) > 1 else None
    return Figure(data, method, kind, float(np.mean(values)), protocol, deviation)


def pseudolabels(data: str, method: str, records: Sequence[Record], protocol: str = "") -> tuple[Pseudolabels, ...]:
    """K and accuracy of the pseudolabels of each iteration, means over runs; none where they are not known."""
    # Labels alone have K = 0; a pool whose labels are unknown has no accuracy.
    known = [record for record in records if None not in record.pseudolabel_accuracy and record.k[0]]
    if not known:
        return ()
    k = tuple(float(np.mean(record.k)) for record in known)
    right = tuple(100 * float(np.mean(record.pseudolabel_accuracy)) for record in known)  # type: ignore[arg-type]
    return (Pseudolabels(data, method, k, right, protocol),)


def per_class(
    data: str,
    method: str,
    class_names: Sequence[str],
    zero_shot: Any,
    predictions: Any,
    labels: np.ndarray,
    protocol: str = "",
) -> PerClass:
    """Accuracy of each class that has test images: zero_shot [N] and predictions [R,N] are classes, labels [N]."""
    labels = np.asarray(labels)
    present = np.unique(labels[labels >= 0])  # -1: not known

    def percent(found: Any) -> tuple[float, ...]:
        runs = np.atleast_2d(found)  # [R,N]
        return tuple(100 * float((runs[:, labels == c] == c).mean()) for c in present)  # over images and runs alike

    names = tuple(class_names[c] for c in present)
    return PerClass(data, method, names, percent(zero_shot), percent(predictions), protocol)


def confusion(
    data: str, method: str, class_names: Sequence[str], predicted: np.ndarray, labels: np.ndarray, protocol: str = ""
) -> Confusion:
    """Pairs of true and predicted class that occur, and how often: predicted [N] and labels [N] are classes."""
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)  # [K,2], [K]
    truth, found = (tuple(class_names[c] for c in column) for column in pairs.T)
    return Confusion(data, method, truth, found, tuple(counts.tolist()), protocol)


def calibration(data: str, method: str, confidence: Any, right: Any, protocol: str = "") -> Reliability:
    """Confidence and accuracy over bins: confidence [N] from 0 to 1, right [N] bool."""
    from jaxzs.adapt.calibration import bins_of

    share, sure, accuracy = (tuple((100 * part).round(3).tolist()) for part in bins_of(confidence, right).T)
    return Reliability(data, method, share, sure, accuracy, protocol)
