"""Methods on data sets in many settings, measured in one way: which images there are, and who is right about them.

A regime says which images of a data set are there: all, so many of each class, classes of unequal size, few classes.
The images that are not drawn are masked, so that all regimes and seeds of a data set share one program a method.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxzs import adapt, proxy
from jaxzs.errors import ConfigError, DataError
from jaxzs.report import Figure, Results, data_entry, markdown_table

Method = Literal["zero-shot", "uniform", "proxy", "closed_form", "stata", "transclip", "gda", "auto"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Features of a data set with their labels, and the text proxies of its classes.

    image_features: [N,E] float32. labels: [N] int. text_features: [C,E] float32. identity: hash of what they come from.
    temperature: 1 / logit scale of the checkpoint.
    """

    name: str
    image_features: np.ndarray
    labels: np.ndarray
    text_features: np.ndarray
    identity: str
    temperature: float = 0.01

    @property
    def entry(self) -> dict[str, Any]:
        """What a record says of them."""
        return data_entry(self.name, self.identity, len(self.labels))


def read_features(path: Path, name: str | None = None) -> Labelled:
    """Features from an .npz file with image_features [N,E], labels [N] and text_features [C,E].

    Raises `DataError` naming the file and what it lacks.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            x, y, z = (stored[key] for key in ("image_features", "labels", "text_features"))
        content = hashlib.sha256(path.read_bytes()).hexdigest()  # two files of one name are not one data set
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: {error}; expected an .npz file with image_features, labels and text_features"
        ) from error
    if x.ndim != 2 or z.ndim != 2 or x.shape[1] != z.shape[1] or y.shape != x.shape[:1]:
        raise DataError(f"{path}: features {x.shape}, labels {y.shape} and text {z.shape} do not fit together")
    if y.dtype.kind not in "iu" or (y < 0).any() or (y >= len(z)).any():
        raise DataError(f"{path}: labels must be whole numbers from 0 to {len(z) - 1}, the number of classes less one")
    name = name or path.stem.split("_")[0]
    return Labelled(name, x.astype(np.float32), y, z.astype(np.float32), content)


def drawn(regime: str, labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """The images of a regime: [N] bool.

    "full": all. "balanced:16": at most so many of each class. "imbalanced:20": class sizes fall geometrically to the
    20th part of the largest. "present:10" or "present:10x30": 10 of the classes only, perhaps 30 images of each. Which
    classes and images is the seed's. Raises `ConfigError` for another text.
    """
    kind, _, size = regime.partition(":")
    rng = np.random.default_rng(seed)
    # Drawn in every regime, so that the images of a seed are drawn from one state whatever the regime.
    order = rng.permutation(num_classes)
    available = np.bincount(labels, minlength=num_classes)
    try:
        if regime == "full":
            wanted = available
        elif kind == "balanced":
            wanted = np.full(num_classes, _positive(size))
        elif kind == "imbalanced":
            falling = float(_positive(size)) ** -np.linspace(0, 1, num_classes)  # [C], from 1 down to 1/size
            wanted = np.zeros(num_classes, int)
            # The largest class gets what the poorest one has in the data: only then can every ratio be met.
            wanted[order] = np.maximum(np.round(falling * available[available > 0].min(initial=10**9)), 1)
        elif kind == "present":
            classes, _, each = size.partition("x")
            wanted = np.zeros(num_classes, int)
            wanted[order[: _positive(classes)]] = _positive(each) if each else available.max()  # or all there are
        else:
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            f"regime {regime!r} is none of full, balanced:16, imbalanced:20, present:10, present:10x30"
        ) from error
    mask = np.zeros(len(labels), bool)
    for c in range(num_classes):
        mask[rng.permutation(np.flatnonzero(labels == c))[: wanted[c]]] = True  # fewer where there are fewer
    return mask


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def probabilities(
    data: Labelled, method: Method, mask: np.ndarray, told: np.ndarray | None, seed: int
) -> tuple[np.ndarray, str]:
    """What a method says of the images that are there, and what it chose: [N,C] calibrated, rows of others anything."""
    x, z, temperature = data.image_features, data.text_features, data.temperature
    if method == "uniform":  # InMaP as published, gamma 0
        result = proxy.fit(x, z, logit_scale=1 / temperature, mask=mask)
        head, chose = adapt.text_head(result.proxies, temperature=4 * temperature), ""  # InMaP's: four times the text's
        return np.asarray(jax.nn.softmax(adapt.scores(head, x), axis=-1)), chose  # [N,C]
    shots = None if told is None or method == "zero-shot" else adapt.Shots(x, told)
    key = jax.random.key(seed)
    found = adapt.fit(x, z, method=method, temperature=temperature, key=key, shots=shots, mask=mask)
    chose = "" if found.choice is None else f"{found.choice.method} {float(found.choice.gamma):g}"
    return np.asarray(adapt.probabilities(found, x)), chose


def measure(data: Labelled, method: Method, regime: str, seed: int, shots: int = 0) -> Results:
    """One cell: accuracy, mean of the classes' accuracies, top 5 and calibration error of a method on what is there.

    shots: images of each class whose labels the method is told; they are not among those that are measured.
    """
    mask = drawn(regime, data.labels, len(data.text_features), seed)
    told, mask = _told(data.labels, mask, shots, seed)
    p, chose = probabilities(data, method, mask, told if shots else None, seed)
    return results(data, method, regime, p[mask], data.labels[mask], chose)


def _told(labels: np.ndarray, mask: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the shots, -1 elsewhere [N], and the images that are left [N]: one of each class at least."""
    told, mask = np.full(len(labels), -1, np.int32), mask.copy()
    rng = np.random.default_rng(1000 + seed)  # other numbers than the regime of the same seed draws
    for c in np.unique(labels[mask]) if shots else ():
        own = rng.permutation(np.flatnonzero(mask & (labels == c)))[:-1][:shots]  # the last one stays to be measured
        told[own], mask[own] = c, False
    return told, mask


def results(data: Labelled, method: str, regime: str, p: np.ndarray, labels: np.ndarray, chose: str) -> Results:
    """The figures of probabilities [n,C] and labels [n], in percent."""
    right = p.argmax(axis=1) == labels
    of_class = [right[labels == c].mean() for c in np.unique(labels)]
    rank = (p > p[np.arange(len(p)), labels][:, None]).sum(axis=1)  # [n], classes above the label's own
    figures = {
        "accuracy": right.mean(),
        "mean per-class recall": np.mean(of_class),
        "acc@5": (rank < 5).mean(),
        "ECE": adapt.expected_calibration_error(p, labels),
    }
    percent = {name: round(100 * float(value), 3) for name, value in figures.items()}
    metrics = {"images": len(labels), "classes present": len(of_class), "chose": chose, **percent}
    return Results(metrics, tuple(Figure(data.name, method, name, value, regime) for name, value in percent.items()))


def table(rows: list[dict[str, Any]], methods: Sequence[str]) -> str:
    """Accuracy of each setting, mean over its seeds; the mean of settings; the worst run against the text."""
    value = {(r["data"], r["regime"], r["seed"], r["method"]): r for r in rows}
    settings = list(dict.fromkeys(key[:2] for key in value))

    def mean(setting: tuple[str, str], method: str) -> float:
        return float(np.mean([r["accuracy"] for k, r in value.items() if k[:2] == setting and k[3] == method]))

    def worst(method: str) -> float:
        of_text = lambda k: value[(*k[:3], "zero-shot")]["accuracy"]  # noqa: E731
        return min(r["accuracy"] - of_text(k) for k, r in value.items() if k[3] == method)

    def everywhere(method: str, figure: str) -> float:
        return float(np.mean([r[figure] for r in rows if r["method"] == method]))

    lines = [[" ".join(setting), *[mean(setting, m) for m in methods]] for setting in settings]
    # Of settings and not of rows: one with more seeds counts no more.
    lines.append(["**mean**", *[float(np.mean([mean(s, m) for s in settings])) for m in methods]])
    lines.append(["**worst run against text**", *[worst(m) for m in methods]])
    for figure in ("mean per-class recall", "acc@5", "ECE"):
        lines.append([figure, *[everywhere(m, figure) for m in methods]])
    return markdown_table(("setting", *methods), lines, 1)
