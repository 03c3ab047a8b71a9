"""`jaxzs demo`: all three families at work, offline, on images whose makers the embedded checkpoints never saw.

Things and scenes by an artist whose hand the checkpoint "art" does not know, and scanned digits for the checkpoint
"demo", which has seen rendered ones only: two honest shifts of domain. What is shown is written to a folder as ordinary
images, on which the commands told at the end can be tried.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from jaxzs.commands import tag
from jaxzs.commands.demo_picture import draw
from jaxzs.commands.options import ComputeOptions, OutputOptions, check_output_folder
from jaxzs.commands.run import Run

if TYPE_CHECKING:
    from jaxzs.classification import Classification
    from jaxzs.clip import Model
    from jaxzs.data.samples import SceneSamples
    from jaxzs.patch import ImageTags, Segmenting
    from jaxzs.report import Figure, PerClass

METHODS = ("zero-shot", "adapted", "proxies, balanced")
STEPS = ("whole image", "TagCLIP")
THINGS, DIGITS, SCENES = "things by an unseen artist", "scanned digits", "scenes by an unseen artist"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions(OutputOptions, ComputeOptions):
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("jaxzs-demo")
    """Folder for the picture, the page, the record, and the images to try commands on."""


def run(options: DemoOptions) -> int:
    """Classify, tag, segment; print the tables, write images, picture, page and record; returns 0."""
    check_output_folder(options.out)
    from jaxzs.classification import rows_of
    from jaxzs.clip import load
    from jaxzs.data import from_arrays, samples
    from jaxzs.report import Results, write_page

    run, out = Run(options), options.out
    with run.measured():
        images, labels, names = samples.things()
        found = samples.scenes()
        run.of_data("art", from_arrays(images, labels).identity, len(images) + len(found.images))
        files = write_images(out, images, labels, found)
        options.notice(f"1/4  600 pictures of {len(names)} things, drawn by an artist whom the model never saw ...")
        run.model = art = load("art")
        things = classify(art, images, labels, names, art.card["templates"]["plain"])
        options.notice("2/4  1,797 scanned digits, and a model that has seen rendered ones only ...")
        demo = load("demo")
        digits = classify(demo, *samples.digits(), demo.card["classes"]["digits"], demo.card["templates"]["digits"])
        options.notice(f"3/4  every thing in {len(found.images)} scenes: tags, and where they are ...")
        tags = tag_scenes(art, found)
        options.notice("4/4  a label for every pixel of them ...")
        masks = segment(found, tags.found)
    tables = {THINGS: things, DIGITS: digits}
    figures = [*of_classification(tables), *tags.figures, *masks.figures]
    run.settings = {"protocol": "transductive", "methods": METHODS}
    metrics = {
        "accuracy": {name: one.accuracy for name, one in tables.items()},
        "tags": {figure.method: figure.value for figure in tags.figures},
        "masks": {figure.method: figure.value for figure in masks.figures},
    }
    picture = out / "demo.png"
    draw(picture, images, found, things=things, digits=digits, tags=tags, masks=masks)
    rows = rows_of(list(map(str, files.things)), names, things.adapted)
    rows = [{**row, "truth": names[label]} for row, label in zip(rows, labels, strict=True)]
    scenes = [tag.row_of(path, tagged, names) for path, tagged in zip(files.scenes, tags.found, strict=True)]
    maps = {row["path"]: tag.maps_of(row, tagged, names) for row, tagged in zip(scenes, tags.found, strict=True)}
    shown = Results(metrics, tuple(figures), tuple(of_classes(tables)), ())
    record = run.record(shown, [*rows, *scenes], class_names=list(names))
    run.write(record, picture)
    write_page(out / "demo.html", record, maps=maps)
    options.say(told(tables, tags, masks))
    options.say(f"\nLook at {picture} and {out / 'demo.html'}; {run.elapsed:.0f} seconds.")
    options.notice(next_steps(out, art.card["tagging"]["relative_threshold"]))
    return run.finish({key: value for key, value in record.items() if key != "results"})


# --- what is done -------------------------------------------------------------------------------------------------


class Classified(NamedTuple):
    """A set that was classified. labels [N]; predicted [N] by each of METHODS; adapted: with its scores.

    accuracy: in % by method. per_class: the same of each class.
    """

    names: Sequence[str]
    labels: np.ndarray
    predicted: dict[str, np.ndarray]
    adapted: Classification
    accuracy: dict[str, float]
    per_class: dict[str, tuple[float, ...]]


def classify(
    model: Model, images: np.ndarray, labels: np.ndarray, names: Sequence[str], templates: Sequence[str]
) -> Classified:
    """Zero-shot, by the rule that never sees a label, and by proxies that are told the classes are balanced."""
    from jaxzs import proxy, zeroshot
    from jaxzs.classification import classify_features

    features = zeroshot.image_features(model, model.preprocess(list(images)))  # [N,E]
    text = zeroshot.text_proxies(model, names, templates)  # [C,E]
    adapted = classify_features(model, features, text)
    balanced = proxy.fit(features, text, proxy.Settings(gamma=0.0), logit_scale=model.logit_scale)
    predicted = {
        "zero-shot": np.asarray(zeroshot.predict(features, text)),
        "adapted": adapted.classes[:, 0],
        "proxies, balanced": np.asarray(zeroshot.predict(features, balanced.proxies)),
    }
    hits = {method: classes == labels for method, classes in predicted.items()}
    accuracy = {method: 100 * float(right.mean()) for method, right in hits.items()}
    per_class = {
        method: tuple(100 * float(right[labels == c].mean()) for c in range(len(names)))
        for method, right in hits.items()
    }
    return Classified(names, labels, predicted, adapted, accuracy, per_class)


class Tagged(NamedTuple):
    """Tags of every scene, and mAP of the whole image's scores and of TagCLIP's."""

    found: list[ImageTags]
    figures: list[Figure]


def tag_scenes(model: Model, given: SceneSamples) -> Tagged:
    """Every thing in each scene, by the class token of the whole image and by TagCLIP."""
    from jaxzs.patch import Batching, Tagging, tag_images, tag_texts
    from jaxzs.patch.metrics import mean_average_precision
    from jaxzs.report import Figure

    texts = tag_texts(model, given.names)
    settings = Tagging(relative_threshold=model.card["tagging"]["relative_threshold"])
    batching = Batching(batch_size=16, offsets=2)
    found = tag_images(model, given.images, texts, settings, num_foreground=len(given.names), batching=batching)
    ordered = sorted(found, key=lambda tagged: tagged.number)
    scores = {
        "whole image": whole_image_scores(model, given.images, texts),
        "TagCLIP": np.stack([tagged.scores for tagged in ordered]),
    }
    there = given.tags[:, given.tags.any(0)]  # a class that is in no scene has no precision
    value = lambda s: 100 * mean_average_precision(s[:, given.tags.any(0)], there)  # noqa: E731
    return Tagged(ordered, [Figure(SCENES, step, "mAP", value(scores[step]), "tags") for step in STEPS])


def whole_image_scores(model: Model, images: np.ndarray, texts: Any) -> np.ndarray:
    """Probability of each name from the class token of the whole image, at its own size: [N,C]."""
    from jaxzs.clip import encode_image
    from jaxzs.patch.local import class_probabilities

    pixels = model.preprocessor.normalize(images)
    features = encode_image(model.params, pixels, model.config, interpolate_positions=True)
    return np.asarray(class_probabilities(features, texts, model.params["logit_scale"]))


class Masked(NamedTuple):
    """Label maps [H,W] of every scene, 0 for the background, and their mIoU."""

    labels: list[np.ndarray]
    figures: list[Figure]


def segment(given: SceneSamples, found: Sequence[ImageTags]) -> Masked:
    """Pixels by the patch scores of the tags found, sharpened along edges by a CRF; and with the true tags."""
    from jaxzs.patch import CRF, Segmenting
    from jaxzs.patch.metrics import segmentation_report
    from jaxzs.report import Figure

    sharpened, figures = Segmenting(crf=CRF()), []
    kinds = {"tags found": np.stack([tagged.tags for tagged in found]), "true tags": given.tags}
    labels = {kind: label_maps(given.images, tags, found, sharpened) for kind, tags in kinds.items()}
    for kind, maps in labels.items():
        report = segmentation_report(maps, given.masks, ["background", *given.names])
        figures.append(Figure(SCENES, kind, "mIoU", 100 * report["mIoU"], "masks"))
    return Masked(labels["tags found"], figures)


def label_maps(
    images: np.ndarray, tags: np.ndarray, found: Sequence[ImageTags], settings: Segmenting
) -> list[np.ndarray]:
    """Labels [H,W] of each image by its patch scores of some tags [N,F] bool."""
    from PIL import Image

    from jaxzs.patch import pixel_labels, score_maps

    numbers = [np.flatnonzero(own) for own in tags]
    return [
        pixel_labels(Image.fromarray(image), score_maps(tagged, own), own, settings)
        for image, own, tagged in zip(images, numbers, found, strict=True)
    ]


# --- what is told -------------------------------------------------------------------------------------------------


def of_classification(tables: dict[str, Classified]) -> list[Figure]:
    """Accuracy of every set and method."""
    from jaxzs.report import Figure

    return [
        Figure(name, method, "accuracy", value, "transductive")
        for name, one in tables.items()
        for method, value in one.accuracy.items()
    ]


def of_classes(tables: dict[str, Classified]) -> list[PerClass]:
    """The same of each class, for the plots of `jaxzs report`."""
    from jaxzs.report import PerClass

    before = METHODS[0]
    return [
        PerClass(name, method, tuple(one.names), one.per_class[before], one.per_class[method], "transductive")
        for name, one in tables.items()
        for method in METHODS[1:]
    ]


def told(tables: dict[str, Classified], tags: Tagged, masks: Masked) -> str:
    """Every figure, as tables."""
    from jaxzs.report import markdown_table

    accuracy = [[name, *(one.accuracy[method] for method in METHODS)] for name, one in tables.items()]
    gains = ", ".join(
        f"{one.accuracy['adapted'] - one.accuracy['zero-shot']:+.1f} points on {name}" for name, one in tables.items()
    )
    lines = [
        "\naccuracy in %, on the fitted images (transductive)",
        markdown_table(["images", *METHODS], accuracy, digits=1),
        f"\nAdapted to the images alone, without a label: {gains}. Proxies are told besides that classes are balanced.",
        f"\n{SCENES}, in %",
        markdown_table(
            ["", "figure", "value"],
            [[figure.method, figure.figure, figure.value] for figure in (*tags.figures, *masks.figures)],
            digits=1,
        ),
    ]
    return "\n".join(lines)


def next_steps(out: Path, threshold: float) -> str:
    """Commands that work as they stand, on the images just written. threshold: of tags."""
    place = lambda name: shlex.quote(str(out / name))  # noqa: E731
    labels = f"--labels-file {place('labels.txt')} --model art"
    tagged = f"{labels} --threshold {threshold} --offsets 2"
    return (
        "\nNext, on these images, and then on your own (with --model openai/clip-vit-base-patch16 and your labels):"
        f"\n  jaxzs classify {place('things')} {labels} --html {place('classes.html')}"
        f"\n  jaxzs tag {place('scenes')} {tagged} --overlay {place('tags')}"
        f"\n  jaxzs segment {place('scenes')} {tagged} --maps scores --crf --out {place('masks')}"
        "\n  jaxzs --help"
    )


# --- files --------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """Where the images are now."""

    things: list[Path]
    scenes: list[Path]


def write_images(out: Path, images: np.ndarray, labels: np.ndarray, found: SceneSamples) -> Files:
    """Things in a folder for each name, scenes in one, names in a text file."""
    from PIL import Image

    from jaxzs.files import atomic_path

    things, scenes = [], []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        things.append(out / "things" / found.names[label] / f"{number:03d}.png")
        things[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(things[-1])
    (out / "scenes").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(found.images):
        scenes.append(out / "scenes" / f"{number:02d}.png")
        Image.fromarray(image).save(scenes[-1])
    with atomic_path(out / "labels.txt") as temporary:
        temporary.write_text("\n".join(found.names) + "\n", encoding="utf-8")
    return Files(things, scenes)
