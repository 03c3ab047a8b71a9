"""What `jaxzs classify` tells of labels: per image, per class, and against the truth where folders name it."""

from __future__ import annotations

import collections
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxzs.commands.run import say_rows
from jaxzs.commands.terminal import counted, one_line

if TYPE_CHECKING:
    import numpy as np

_LISTED = 20  # rows of a terminal that are read at a glance
_SQUARE = 10  # classes of a confusion matrix that fits a terminal


def measures(classes: np.ndarray, scores: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Figures of classes [N,k], most similar first, against the truth [N]: in percent, and counts by true class.

    scores: [N], of the first ones.

    `confusion` holds of each true class how often it got which label; `recall` the share that got its own.
    """
    from jaxzs.adapt.calibration import bins_of, error_of_bins

    counts: dict[str, collections.Counter[str]] = {}
    for predicted, true in zip(classes[:, 0], truth, strict=True):
        counts.setdefault(names[true], collections.Counter())[names[predicted]] += 1
    recall = {name: 100 * own[name] / own.total() for name, own in counts.items()}
    # Among no more than five classes it would be 100 % always.
    top = {} if len(names) <= 5 else {"accuracy_at_5": 100 * float((classes[:, :5] == truth[:, None]).any(1).mean())}
    return {
        "accuracy": 100 * float((classes[:, 0] == truth).mean()),
        **top,
        "mean_per_class_recall": sum(recall.values()) / len(recall),
        "expected_calibration_error": 100 * error_of_bins(bins_of(scores, classes[:, 0] == truth)),
        "recall": recall,
        "confusion": {name: dict(own.most_common()) for name, own in counts.items()},
    }


def confusion_table(metrics: Mapping[str, Any]) -> str:
    """Per class: how many images, its recall, and what they were taken for; the poorest of many classes."""
    from jaxzs.report import markdown_table

    confusion, recall = metrics["confusion"], metrics["recall"]
    shown = sorted(recall, key=lambda name: recall[name])[:_LISTED] if len(recall) > _LISTED else list(recall)
    # Also labels that are nobody's truth, but were given.
    labels = list(dict.fromkeys([*recall, *(label for own in confusion.values() for label in own)]))
    if len(labels) <= _SQUARE:
        header = ["truth, labelled as", *map(one_line, labels), "recall, %"]
        rows = [[one_line(name), *(confusion[name].get(x, 0) for x in labels), recall[name]] for name in shown]
    else:
        header = ["truth", "images", "recall, %", "labelled as"]
        rows = [[one_line(name), sum(confusion[name].values()), recall[name], _most(confusion[name])] for name in shown]
    lines = [markdown_table(header, rows, digits=1)]
    lines += [f"... the {_LISTED} poorest of {len(recall)} classes"] * (len(shown) < len(recall))
    mean = f"mean per-class recall {metrics['mean_per_class_recall']:.2f} %"
    if "accuracy_at_5" in metrics:
        mean += f", among the five best {metrics['accuracy_at_5']:.2f} %"
    mean += f"; scores are {metrics['expected_calibration_error']:.2f} % off on average (expected calibration error)"
    return "\n".join([*lines, mean])


def _most(labels: dict[str, int]) -> str:
    # The most frequent first: `measures` has put them into that order.
    shown = [f"{one_line(label)} {count}" for label, count in list(labels.items())[:3]]
    return ", ".join([*shown, *["..."] * (len(labels) > len(shown))])


def say_labels(options: Any, rows: Sequence[dict[str, Any]], *, in_file: bool) -> None:
    """A line an image; where a person looks on, or a file has all of them, of many only the least certain.

    Then a line a label: how many images got it.
    """
    if len(rows) <= _LISTED or not (in_file or sys.stdout.isatty()):
        say_rows(options, rows, "top", in_file=False)
        return
    least = sorted(rows, key=lambda row: row["score"])[:_LISTED]
    options.say(f"the {_LISTED} least certain of {counted(len(rows), 'image')}:")
    say_rows(options, least, "top", in_file=False)
    counts = collections.Counter(row["label"] for row in rows)
    listed = [f"{one_line(label)} {count:,}" for label, count in counts.most_common(_LISTED)]
    more = [f"and {len(counts) - _LISTED} more"] if len(counts) > _LISTED else []
    options.say(f"labels: {', '.join([*listed, *more])}")
