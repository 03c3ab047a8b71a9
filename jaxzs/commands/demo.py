"""`jaxzs demo`: real handwritten digits, classified zero-shot and with proxies learned from them. Offline.

The images are the 1,797 scanned digits that come with scikit-learn (UCI "Optical Recognition of Handwritten Digits").
The checkpoint has only ever seen rendered glyphs, so this is an honest shift of domain.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from jaxzs.commands.options import ComputeOptions, OutputOptions, check_output_folder
from jaxzs.commands.run import Run

if TYPE_CHECKING:
    from jaxzs.clip import Model
    from jaxzs.report import Convergence, Results

METHODS = ("zero-shot", "proxies, plain", "proxies, Sinkhorn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions(OutputOptions, ComputeOptions):
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("jaxzs-demo")
    """Folder for the picture and the record."""


def run(options: DemoOptions) -> int:
    """Classify, print the table, save the picture and the record; returns 0."""
    check_output_folder(options.out)
    from jaxzs.data import from_arrays

    run = Run(options)
    options.notice("Reading 1,797 real handwritten digits and the embedded CLIP (trained on drawings only) ...")
    with run.measured():
        images, labels = real_digits()
        run.of_data("scikit-learn digits", from_arrays(images, labels).identity, len(images))
        run.model, predictions, curves, stages = classify_digits(images)
    run.seconds |= {name: round(value, 3) for name, value in stages.items()}
    per_class = {name: accuracies(predicted, labels) for name, predicted in predictions.items()}
    overall = {name: percent(predicted == labels) for name, predicted in predictions.items()}
    picture = options.out / "demo.png"
    draw(picture, images, labels, predictions, per_class)
    run.settings = {"protocol": "transductive", "methods": METHODS}
    record = run.record(results_of(overall, per_class, curves))
    run.write(record, picture)
    options.say("\n" + table(overall, per_class))
    gain = overall["proxies, Sinkhorn"] - overall["zero-shot"]
    options.say(f"\nProxies were learned from the images alone, without labels: {gain:+.1f} points.")
    options.say(f"Picture: {picture}   record: {picture.with_suffix('.json')}   {run.elapsed:.0f} seconds.")
    options.notice(
        "\nNext, on your own images:"
        "\n  jaxzs classify FOLDER --labels cat,dog --model openai/clip-vit-base-patch32"
        "\n  jaxzs --help"
    )
    return run.finish(record)


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Scanned digits, white on black: ([1797,8,8] uint8, labels [1797] of 0 to 9)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target  # 0 to 16 as scanned


class Classified(NamedTuple):
    """Predicted digit of each image by each of `METHODS`, how proxies converged, seconds of each stage."""

    model: Model
    predictions: dict[str, np.ndarray]
    convergence: list[Convergence]
    seconds: dict[str, float]


def classify_digits(images: np.ndarray) -> Classified:
    """Zero-shot, and by proxies with plain and with Sinkhorn labels; compiling is in the seconds."""
    import jax

    from jaxzs import proxy, zeroshot
    from jaxzs.clip import load
    from jaxzs.report.curves import convergence

    clock = _Clock()
    model = load("demo")
    classes = model.card["classes"]["digits"]
    clock.lap("load")
    features = zeroshot.image_features(model, model.preprocess(list(images)))  # [N,E]
    # Waited for: its seconds would be counted for the next stage.
    jax.block_until_ready(features)
    clock.lap("encode images")
    text = zeroshot.text_proxies(model, classes, model.card["templates"]["digits"])  # [C,E]
    predictions = {"zero-shot": np.asarray(zeroshot.predict(features, text))}
    clock.lap("text proxies")
    curves = []
    # 1 takes the class balance that the text predicts, 0 a uniform one, which these digits very nearly have.
    for name, gamma in (("proxies, plain", 1.0), ("proxies, Sinkhorn", 0.0)):
        learned = proxy.fit(features, text, proxy.Settings(gamma=gamma), logit_scale=model.logit_scale)
        predictions[name] = np.asarray(zeroshot.predict(features, learned.proxies))
        curves.append(convergence("scikit-learn digits", "fast", learned, name))
    clock.lap("learn proxies")
    return Classified(model, predictions, curves, clock.seconds)


def results_of(overall: dict[str, float], per_class: dict[str, list[float]], curves: list[Convergence]) -> Results:
    """What `jaxzs report` makes tables and plots of."""
    from jaxzs.report import Figure, PerClass, Results

    data, protocol = "scikit-learn digits", "transductive"
    digits, before = tuple(map(str, range(10))), tuple(per_class[METHODS[0]])
    return Results(
        {"accuracy": overall, "per_class": per_class},
        tuple(Figure(data, name, "accuracy", value, protocol) for name, value in overall.items()),
        tuple(PerClass(data, name, digits, before, tuple(per_class[name]), protocol) for name in METHODS[1:]),
        tuple(curves),
    )


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def percent(hits: np.ndarray) -> float:
    """Share of True, in percent."""
    return 100 * float(np.mean(hits))


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> list[float]:
    """Accuracy of each class in percent."""
    return [percent(predicted[labels == digit] == digit) for digit in range(10)]


def table(overall: dict[str, float], per_class: dict[str, list[float]]) -> str:
    """Accuracy in percent, overall and of each digit, one row a method."""
    from jaxzs.report import markdown_table

    rows = [[name, overall[name], *per_class[name]] for name in METHODS]
    return "accuracy in %, on the fitted images (transductive)\n" + markdown_table(
        ["method", "all", *map(str, range(10))], rows, digits=1
    )


def draw(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: dict[str, np.ndarray],
    per_class: dict[str, list[float]],
) -> None:
    """Digits whose label changed, with the prediction before and after; bars of accuracy by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxzs.files import atomic_path

    before, after = predictions[METHODS[0]], predictions[METHODS[-1]]
    changed = np.flatnonzero(before != after)
    shown = np.random.default_rng(0).permutation(changed)[:40]  # four rows of ten
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(figure)  # it attaches itself to the figure
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.75, 1))
    top, bottom = parts
    top.suptitle(
        f"Real digits whose label changed ({len(shown)} of {len(changed)} shown): "
        "zero-shot \N{RIGHTWARDS ARROW} learned proxies"
    )
    axes: Any = top.subplots(4, 10)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, shown, strict=False):  # fewer may have changed
        axis.imshow(images[index], cmap="gray_r", interpolation="bicubic")
        right, lost = after[index] == labels[index], before[index] == labels[index]
        colour = "tab:green" if right else "tab:red" if lost else "tab:gray"
        title = f"{before[index]} \N{RIGHTWARDS ARROW} {after[index]}"
        axis.set_title(title, color=colour, fontsize=11)
    axis = bottom.subplots()
    for offset, name in zip((-0.27, 0, 0.27), METHODS, strict=True):
        axis.bar(np.arange(10) + offset, per_class[name], width=0.26, label=name)
    axis.set(xticks=range(10), ylabel="accuracy, %", ylim=(0, 118), xlabel="digit")  # room for the legend above 100
    axis.set_title("green: now right, red: now wrong, grey: wrong both times", fontsize=9)
    axis.legend(ncols=3, loc="upper center", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
