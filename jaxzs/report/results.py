"""What a run has measured, in the shapes that tables and plots are made of.

All numbers are in percent except objectives and gradient norms. `data`, `method` and `protocol` are short names that
become rows, columns and legends, so runs that are to stand side by side spell them alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxzs.errors import RecordError
from jaxzs.files import from_json

_Shape = TypeVar("_Shape")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of a table: accuracy, harmonic mean, mAP, mIoU, ... in percent.

    protocol: what the number is of, e.g. "transductive", "held out", "UL". deviation: standard deviation over runs.
    passes: how often the method read the features of all images to find its classifier; None where nobody counted.

    >>> report.Figure("digits", "zero-shot", "accuracy", 83.1, protocol="transductive").value
    83.1
    """

    data: str
    method: str
    figure: str
    value: float
    protocol: str = ""
    deviation: float | None = None
    passes: float | None = None


@dataclasses.dataclass(frozen=True)
class PerClass:
    """Accuracy of each class in percent, zero-shot and with a method: lists as long as `classes`.

    >>> report.PerClass("digits", "proxies", ("one", "two"), (60.0, 90.0), (80.0, 90.0)).classes
    ('one', 'two')
    """

    data: str
    method: str
    classes: tuple[str, ...]
    zero_shot: tuple[float, ...]
    accuracy: tuple[float, ...]
    protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How many images of a class (truth) were given which (predicted): lists of the pairs that occur.

    >>> report.Confusion("digits", "proxies", ("one", "one"), ("one", "two"), (8, 2)).images
    (8, 2)
    """

    data: str
    method: str
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    images: tuple[int, ...]
    protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Of each bin of confidence: its share of the images, their mean confidence and their accuracy, all in percent.

    >>> report.Reliability("digits", "proxies", (40.0, 60.0), (55.0, 95.0), (50.0, 90.0)).accuracy
    (50.0, 90.0)
    """

    data: str
    method: str
    share: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Convergence:
    """Objective of a proxy solver, and the norm of its gradient, after so many passes over the features.

    labels: the pseudo labels that the objective is of; only objectives of the same labels can be compared.

    >>> report.Convergence("digits", "fast", passes=(1.0, 30.0), objective=(0.9, 0.4)).objective[-1]
    0.4
    """

    data: str
    method: str
    passes: tuple[float, ...]
    objective: tuple[float, ...]
    gradient_norm: tuple[float, ...] | None = None
    labels: str = ""


@dataclasses.dataclass(frozen=True)
class Pseudolabels:
    """Pseudolabels of a strategy: k per class, and how many percent of them are right, iteration by iteration.

    >>> report.Pseudolabels("digits", "grip", k=(5.0, 10.0), accuracy=(90.0, 80.0)).accuracy
    (90.0, 80.0)
    """

    data: str
    method: str
    k: tuple[float, ...]
    accuracy: tuple[float, ...]
    protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a run, or a part of it, has measured. metrics: JSON values as the experiment likes them.

    >>> figure = report.Figure("digits", "zero-shot", "accuracy", 83.1)
    >>> report.Results(figures=(figure,)).as_json()["figures"][0]["value"]
    83.1
    """

    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    per_class: tuple[PerClass, ...] = ()
    convergence: tuple[Convergence, ...] = ()
    pseudolabels: tuple[Pseudolabels, ...] = ()
    confusion: tuple[Confusion, ...] = ()
    reliability: tuple[Reliability, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """`metrics`, and every list that is not empty; figures that are not finite (an F1 of no tags) are left out."""
        finite = tuple(figure for figure in self.figures if math.isfinite(figure.value))
        given = dataclasses.replace(self, figures=finite)
        lists = {
            name: [_without_none(dataclasses.asdict(one)) for one in getattr(given, name)]
            for name in SHAPES
            if getattr(given, name)
        }
        return {"metrics": dict(self.metrics), **lists}


# The keys of the JSON, in their order there.
SHAPES: dict[str, type] = {
    "figures": Figure,
    "per_class": PerClass,
    "convergence": Convergence,
    "pseudolabels": Pseudolabels,
    "confusion": Confusion,
    "reliability": Reliability,
}


def joined(parts: Iterable[Results]) -> Results:
    """The lists of several results behind each other; metrics are left out."""
    parts = list(parts)
    lists: dict[str, Any] = {name: tuple(one for part in parts for one in getattr(part, name)) for name in SHAPES}
    return Results(**lists)


def renamed(results: Results, data: str) -> Results:
    """The same of data of another name."""
    lists: dict[str, Any] = {
        name: tuple(dataclasses.replace(one, data=data) for one in getattr(results, name)) for name in SHAPES
    }
    return dataclasses.replace(results, **lists)


def parse(values: Mapping[str, Any], where: str) -> Results:
    """The inverse of `Results.as_json`. Raises `RecordError` naming the place `where` something is unfit."""
    lists: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        listed = values.get(name, [])
        if not isinstance(listed, list):
            raise RecordError(f"{where}: {name} is {_kind(listed)}, expected a list")
        lists[name] = tuple(_parse_one(shape, value, f"{where}: {name}[{i}]") for i, value in enumerate(listed))
    metrics = values.get("metrics", {})
    if not isinstance(metrics, dict):
        raise RecordError(f"{where}: metrics is {_kind(metrics)}, expected an object")
    return Results(metrics, **lists)


def _parse_one(shape: type[_Shape], value: Any, where: str) -> _Shape:
    parsed = from_json(shape, value, where, RecordError)
    # All lists of a shape go along one axis: classes, passes or iterations.
    lists = [entry for entry in vars(parsed).values() if isinstance(entry, tuple)]
    if len(set(map(len, lists))) > 1:
        raise RecordError(f"{where}: its lists differ in length")
    return parsed


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if entry is not None}
