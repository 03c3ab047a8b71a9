"""Methods on data sets in many settings, measured in one way: which images there are, and who is right about them.

A regime says which images of a data set are there: all, so many of each class, classes of unequal size, few classes.
The images that are not drawn are masked, so that all regimes and seeds of a data set share one program a method.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import adapt, proxy
from jaxzs.errors import ConfigError, DataError
from jaxzs.proxy.checks import features_and_proxies
from jaxzs.report import Figure, Results, Sweep, curves, data_entry, markdown_table
from jaxzs.zeroshot import predict

Method = Literal["zero-shot", "uniform", "proxy", "closed_form", "stata", "transclip", "gda", "auto"]
METHODS: tuple[Method, ...] = get_args(Method)
MEASURES = ("accuracy", "mean per-class recall", "acc@5", "ECE")  # of every cell, in percent
NUMBERS = 2**26  # float32 numbers that the runs of one program hold at once: 256 MB


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Features of a data set with their labels, and the text proxies of its classes.

    image_features: [N,E] float32. labels: [N] int. text_features: [C,E] float32. identity: hash of what they come from.
    temperature: 1 / logit scale of the checkpoint. class_names: C texts, or none where they are not known.
    """

    name: str
    image_features: np.ndarray
    labels: np.ndarray
    text_features: np.ndarray
    identity: str
    temperature: float = 0.01
    class_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The classes as plots name them."""
        return self.class_names or tuple(map(str, range(len(self.text_features))))

    @property
    def entry(self) -> dict[str, Any]:
        """What a record says of them."""
        return data_entry(self.name, self.identity, len(self.labels))


def read_features(path: Path, name: str | None = None) -> Labelled:
    """Features from an .npz file with image_features [N,E], labels [N], text_features [C,E], perhaps class_names [C].

    Features may be of any float type. Raises `DataError` naming the file, what it lacks and what is not usable.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            x, y, z = (stored[key] for key in ("image_features", "labels", "text_features"))
            names = tuple(map(_text, stored["class_names"])) if "class_names" in stored else ()
        content = hashlib.sha256(path.read_bytes()).hexdigest()  # two files of one name are not one data set
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise DataError(f"{path}: {error}; expected image_features, labels and text_features") from error
    except Exception as error:  # zipfile, zlib and NumPy have errors of their own, and advice that is not ours
        raise DataError(
            f"{path} is damaged, holds objects, or is no .npz file; expected one of image_features, labels and "
            "text_features"
        ) from error
    if x.ndim != 2 or z.ndim != 2 or x.shape[1] != z.shape[1] or y.shape != x.shape[:1]:
        raise DataError(f"{path}: features {x.shape}, labels {y.shape} and text {z.shape} do not fit together")
    if y.dtype.kind not in "iu" or (y < 0).any() or (y >= len(z)).any():
        raise DataError(f"{path}: labels must be whole numbers from 0 to {len(z) - 1}, the number of classes less one")
    if names and len(names) != len(z):
        raise DataError(f"{path}: {len(names)} class_names for {len(z)} rows of text_features")
    try:
        x, z, _ = map(np.asarray, features_and_proxies(x, z, None))
    except DataError as error:
        raise error.within(str(path)) from error
    name = name or path.stem.split("_")[0]
    return Labelled(name, x.astype(np.float32), y, z.astype(np.float32), content, class_names=names)


def _text(name: Any) -> str:
    """A class name; names that were stored as bytes are UTF-8."""
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


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


@dataclasses.dataclass(frozen=True)
class Run:
    """What one cell of a table measures of a data set, beside the method.

    regime: of `drawn`. seed: of what the regime and the shots draw. shots: images of each class whose labels the method
    is told; they are not among those that are measured.
    """

    regime: str = "full"
    seed: int = 0
    shots: int = 0

    @property
    def setting(self) -> str:
        """Regime and shots: what the seeds of a row of the table have in common."""
        return self.regime + (f", {self.shots} shot{'s' * (self.shots != 1)}" if self.shots else "")

    @property
    def protocol(self) -> str:
        """How figures name it."""
        return f"{self.setting}, seed {self.seed}"


class Cell(NamedTuple):
    """A run of a method, what it has measured, and its seconds, a program's shared evenly among its runs."""

    data: str
    method: str
    run: Run
    results: Results
    seconds: float

    @property
    def row(self) -> dict[str, Any]:
        """As JSON: what it is, and what was measured."""
        own = {"data": self.data, "method": self.method, **dataclasses.asdict(self.run), "setting": self.run.setting}
        return {**own, **self.results.metrics, "seconds": self.seconds}


class Drawn(NamedTuple):
    """Images of one run, or of several with an axis [R] before: all that differs between runs of a method.

    mask: [N] bool, images that are there and not told. told: [N] int32, the class of an image that the method is told,
    -1 elsewhere; None without shots. key: of random splits.
    """

    mask: Any
    told: Any
    key: Any


class Answer(NamedTuple):
    """What a method says of the images of one run, or of several with an axis [R] before.

    probabilities: [N,C] calibrated, rows of other images anything. passes: [] how often it has read the features of all
    images to find its classifier, see `jaxzs.adapt.Adapted`. choice: of the rule.
    """

    probabilities: Any
    passes: Any
    choice: adapt.Choice | None = None


@partial(jax.jit, static_argnames="method")
def answers(x: jax.Array, text: jax.Array, temperature: jax.Array, runs: Drawn, *, method: Method) -> Answer:
    """What a method says in several runs at once, all with an axis [R] before.

    x: [N,E]. text: [C,E]. temperature: []. runs: `Drawn` with an axis [R].
    """

    def one(run: Drawn) -> Answer:
        if method == "uniform":  # InMaP as published, gamma 0
            result = proxy.fit(x, text, logit_scale=1 / temperature, mask=run.mask)
            head = adapt.text_head(result.proxies, temperature=4 * temperature)  # InMaP's: four times the text's
            # The solver counts its own; before it each scaling of columns is a pass, and the sums of the labels.
            passes = result.passes + (proxy.Settings().sinkhorn_iterations + 1)
            return Answer(jax.nn.softmax(adapt.scores(head, x), axis=-1), passes)
        shots = None if run.told is None or method == "zero-shot" else adapt.Shots(x, run.told)
        found = adapt.fit(x, text, method=method, temperature=temperature, key=run.key, shots=shots, mask=run.mask)
        return Answer(adapt.probabilities(found, x), found.passes, found.choice)

    return jax.vmap(one)(runs)


def at_once(data: Labelled, runs: int) -> int:
    """How many of so many runs share a program, evenly: what they hold stays below `NUMBERS` numbers."""
    num_images, dim = data.image_features.shape
    num_classes = len(data.text_features)
    # Features and scores of the images of a run; class means of the halves, splits and balances that the rule compares.
    of_run = max(num_images * max(num_classes, dim), 80 * num_classes * dim)
    calls = -(-runs // max(1, NUMBERS // of_run))
    return -(-runs // max(1, calls))


def measure(data: Labelled, method: Method, runs: Sequence[Run]) -> list[Results]:
    """Accuracy, mean of the classes' accuracies, top 5, calibration error and passes of a method, by one program.

    runs: all with shots, or all without, and as many as memory allows (`at_once`). Of seed 0 also what plots are made
    of. Raises `DataError` for features that cannot be used, and a run without images.
    """
    drawn_of = [images_of(data, run) for run in runs]
    masks = np.stack([mask for mask, _ in drawn_of])  # [R,N]
    told = np.stack([told for _, told in drawn_of]) if runs[0].shots else None
    x, text, _ = features_and_proxies(data.image_features, data.text_features, None)  # traced values are not checked
    keys = jax.vmap(jax.random.key)(np.array([run.seed for run in runs], np.uint32))  # [R]
    own = Drawn(masks, told, keys)
    together = answers(x, text, jnp.float32(data.temperature), own, method=method)
    found = [jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in range(len(runs))]
    return [results(data, method, run, own, mask) for run, own, mask in zip(runs, found, masks, strict=True)]


def images_of(data: Labelled, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The images that are measured [N] bool, and the classes that are told [N] int32; `DataError` for none."""
    mask = drawn(run.regime, data.labels, len(data.text_features), run.seed)
    told, mask = _told(data.labels, mask, run.shots, run.seed)
    if not mask.any():
        raise DataError(f"{data.name}: no images are left in {run.protocol}; ask for more classes or images")
    return mask, told


def _told(labels: np.ndarray, mask: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the shots, -1 elsewhere [N], and the images that are left [N]: one of each class at least."""
    told, mask = np.full(len(labels), -1, np.int32), mask.copy()
    rng = np.random.default_rng(1000 + seed)  # other numbers than the regime of the same seed draws
    for c in np.unique(labels[mask]) if shots else ():
        own = rng.permutation(np.flatnonzero(mask & (labels == c)))[:-1][:shots]  # the last one stays to be measured
        told[own], mask[own] = c, False
    return told, mask


def results(data: Labelled, method: str, run: Run, answer: Answer, mask: np.ndarray) -> Results:
    """The figures of an answer about the images in mask [N], in percent, and its passes."""
    labels, p, choice = data.labels[mask], np.asarray(answer.probabilities)[mask], answer.choice  # [n], [n,C]
    right = p.argmax(axis=1) == labels
    of_class = [right[labels == c].mean() for c in np.unique(labels)]
    rank = (p > p[np.arange(len(p)), labels][:, None]).sum(axis=1)  # [n], classes above the label's own
    own = right.mean(), np.mean(of_class), (rank < 5).mean(), adapt.expected_calibration_error(p, labels)
    figures = dict(zip(MEASURES, own, strict=True))
    percent = {name: round(100 * float(value), 3) for name, value in figures.items()}
    chose = "" if choice is None else f"{choice.method} {float(choice.gamma):g}"
    passes = float(answer.passes)
    metrics = {"images": len(labels), "classes present": len(of_class), "chose": chose, "passes": passes, **percent}
    shown = tuple(Figure(data.name, method, *one, run.protocol, passes=passes) for one in percent.items())
    # Other seeds are repetitions: their figures are kept, a plot of each would tell nothing more.
    return (
        _with_plots(Results(metrics, shown), data, method, run, p, mask) if run.seed == 0 else Results(metrics, shown)
    )


def _with_plots(found: Results, data: Labelled, method: str, run: Run, p: np.ndarray, mask: np.ndarray) -> Results:
    """Also confusions, calibration, and changes per class against the text."""
    labels, predicted, names, protocol = data.labels[mask], p.argmax(axis=1), data.names, run.protocol
    confusion = curves.confusion(data.name, method, names, predicted, labels, protocol)
    calibration = curves.calibration(data.name, method, p.max(axis=1), predicted == labels, protocol)
    found = dataclasses.replace(found, confusion=(confusion,), reliability=(calibration,))
    if method == "zero-shot":
        return found
    text = np.asarray(predict(jnp.asarray(data.image_features[mask]), jnp.asarray(data.text_features)))  # [n]
    changes = curves.per_class(data.name, method, names, text, predicted, labels, protocol)
    return dataclasses.replace(found, per_class=(changes,))


def cells(sweep: Sweep, data: Labelled, method: Method, runs: Sequence[Run], *, prefix: str = "") -> dict[str, Cell]:
    """`measure` into the cells of a sweep, but those that are kept: by their keys, which begin with `prefix`."""
    keys = {f"{prefix}{method} {run.regime} {run.seed} {run.shots}": run for run in runs}
    settings = {key: {"method": method, **dataclasses.asdict(run)} for key, run in keys.items()}
    computed: dict[str, Results] = {}
    # With shots it is another program.
    for own in ([key for key in keys if not keys[key].shots], [key for key in keys if keys[key].shots]):
        computed |= sweep.batch(
            {key: settings[key] for key in own},
            lambda missing: measure(data, method, [keys[key] for key in missing]),
            size=at_once(data, max(1, len(own))),
            data=data.entry,
            needs=MEASURES,
        )
    seconds = {key: sweep.cells[key]["seconds"].get("run", 0.0) for key in keys}
    return {key: Cell(data.name, method, run, computed[key], seconds[key]) for key, run in keys.items()}


def table(found: Sequence[Cell], methods: Sequence[str]) -> str:
    """Accuracy of each setting, mean over its seeds; the mean of settings; the worst run against the text."""
    value = {(cell.data, cell.run.setting, cell.run.seed, cell.method): cell.results.metrics for cell in found}
    settings = list(dict.fromkeys(key[:2] for key in value))

    def mean(setting: tuple[str, str], method: str) -> float | None:
        own = [r["accuracy"] for k, r in value.items() if k[:2] == setting and k[3] == method]
        return float(np.mean(own)) if own else None  # a method that knows no shots

    def worst(method: str) -> float:
        of_text = lambda k: value[(*k[:3], "zero-shot")]["accuracy"]  # noqa: E731
        return min(r["accuracy"] - of_text(k) for k, r in value.items() if k[3] == method)

    def everywhere(method: str, figure: str) -> float:
        return float(np.mean([r[figure] for k, r in value.items() if k[3] == method]))

    def of_settings(method: str) -> float:
        # Of settings and not of rows: one with more seeds counts no more.
        return float(np.mean([m for s in settings if (m := mean(s, method)) is not None]))

    lines: list[list[Any]] = [[" ".join(setting), *[mean(setting, m) for m in methods]] for setting in settings]
    lines.append(["**mean**", *map(of_settings, methods)])
    lines.append(["**worst run against text**", *[worst(m) for m in methods]])
    for figure in MEASURES[1:]:
        lines.append([figure, *[everywhere(m, figure) for m in methods]])
    # Cells that are kept from records of before passes were counted have none.
    of_passes = [
        [k["passes"] for cell in found if cell.method == m and "passes" in (k := cell.results.metrics)] for m in methods
    ]
    lines.append(["passes over the images", *[float(np.mean(own)) if own else None for own in of_passes]])
    of_runs = [float(np.mean([cell.seconds for cell in found if cell.method == m])) for m in methods]
    lines.append(["milliseconds a run, compiled", *[1000 * own for own in of_runs]])
    return markdown_table(("setting", *methods), lines, 1)
