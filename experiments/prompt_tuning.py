"""Prompt tuning with pseudolabels: zero-shot, labels alone, FPL, IFPL and GRIP, for every modality and paradigm.

On the demo checkpoint, with real handwritten digits (scikit-learn's) and with outline shapes, a style it never saw:

    python -m experiments.prompt_tuning --data digits outlines

On one of the six published data sets, with the published settings, next to the published numbers:

    python -m experiments.prompt_tuning --data eurosat --train FOLDER/train --test FOLDER/test \\
        --model openai/clip-vit-base-patch32

Three seeds are trained together. In SSL and UL a seed is a draw of the initial prompts; in TRZSL it is one of the
published class splits (500, 0, 200) as well. Each cell is saved when it is finished, an interrupted one goes on where
it was, and what is there already is not computed again. Tables, plots and records go to results/prompt_tuning/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxzs import data, load, prompt
from jaxzs.clip import Model
from jaxzs.errors import LabelError
from jaxzs.files import write_json
from jaxzs.prompt.files import MODALITIES
from jaxzs.prompt.protocol import SPLIT_SEEDS
from jaxzs.report import environment, markdown_table

RESULTS = Path(__file__).parent / "results" / "prompt_tuning"
PARADIGMS = ("ssl", "trzsl", "ul")
STRATEGIES = ("labelled", "fpl", "ifpl", "grip")

# README of the authors' repository (BatsResearch/menghini-neurips23-code), %: SSL, UL, TRZSL. No FPL, no IFPL.
PUBLISHED: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = {
    "flowers102": {
        "zero-shot": (63.7, 63.7, 63.4),
        "text labelled": (76.8, None, 63.2),
        "text grip": (83.6, 69.8, 86.3),
        "image labelled": (63.7, None, 64.7),
        "image grip": (67.9, 63.1, 77.2),
        "joint labelled": (68.0, None, 61.1),
        "joint grip": (74.6, 64.8, 82.0),
    },
    "resisc45": {
        "zero-shot": (54.5, 54.5, 54.5),
        "text labelled": (58.5, None, 63.4),
        "text grip": (74.1, 70.6, 81.1),
        "image labelled": (60.8, None, 67.1),
        "image grip": (71.2, 68.4, 82.2),
        "joint labelled": (62.8, None, 58.8),
        "joint grip": (73.7, 69.4, 82.2),
    },
    "fgvc_aircraft": {
        "zero-shot": (17.6, 17.6, 17.9),
        "text labelled": (14.9, None, 21.7),
        "text grip": (17.0, 15.2, 26.1),
        "image labelled": (17.8, None, 26.7),
        "image grip": (19.4, 17.5, 26.4),
        "joint labelled": (11.1, None, 15.9),
        "joint grip": (17.4, 14.7, 17.9),
    },
    "mnist": {
        "zero-shot": (25.1, 25.1, 20.8),
        "text labelled": (56.4, None, 21.2),
        "text grip": (71.8, 67.9, 74.1),
        "image labelled": (42.5, None, 25.5),
        "image grip": (69.7, 68.0, 69.5),
        "joint labelled": (64.4, None, 63.6),
        "joint grip": (65.9, 68.2, 73.8),
    },
    "eurosat": {
        "zero-shot": (32.9, 32.9, 30.5),
        "text labelled": (59.5, None, 49.7),
        "text grip": (58.7, 57.2, 92.3),
        "image labelled": (47.1, None, 62.2),
        "image grip": (63.5, 63.7, 97.0),
        "joint labelled": (68.9, None, 60.4),
        "joint grip": (60.4, 61.5, 95.5),
    },
    "dtd": {
        "zero-shot": (43.2, 43.2, 43.4),
        "text labelled": (37.1, None, 46.3),
        "text grip": (56.1, 46.1, 65.3),
        "image labelled": (36.4, None, 44.2),
        "image grip": (54.6, 50.5, 62.8),
        "joint labelled": (43.7, None, 36.9),
        "joint grip": (54.1, 47.4, 64.4),
    },
}


class Settings(NamedTuple):
    """What differs between the demo and the published runs."""

    lengths: dict[str, int]  # tokens of a prompt, by modality
    k: int
    iterations: int
    literal_braces: bool
    optimisation: prompt.Optimisation


OFFICIAL = Settings({"text": 16, "image": 16, "joint": 4}, 16, 10, True, prompt.Optimisation())
# The demo checkpoint takes 32 tokens and a CPU must do; its small vocabulary makes nothing of braces.
DEMO = Settings(
    {"text": 8, "image": 8, "joint": 4},
    8,
    3,
    False,
    prompt.Optimisation(epochs=8, warmup_epochs=1),
)


Images = (
    tuple[np.ndarray, np.ndarray] | data.Source
)  # (pixels, labels), or read when a modality asks


class Task(NamedTuple):
    """A pool to learn from and images to test on."""

    name: str
    class_names: list[str]
    template: str
    train: Images
    test: Images


# --- data ---------------------------------------------------------------------------------------------


def digits(model: Model, num_train: int = 200, num_test: int = 400) -> Task:
    """scikit-learn's real handwritten digits, in a fixed random order."""
    from sklearn.datasets import load_digits

    from experiments.demo_world.captions import DIGITS

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[: num_train + num_test]
    images = list(np.round(found.images[order] * (255 / 16)).astype(np.uint8))
    pixels, labels = model.preprocess(images), found.target[order].astype(np.int64)
    train, test = slice(0, num_train), slice(num_train, None)
    parts = (pixels[train], labels[train]), (pixels[test], labels[test])
    return Task("digits", list(DIGITS), "a photo of the digit {}", *parts)


def outlines(model: Model, num_train: int = 220, num_test: int = 440) -> Task:
    """Outline shapes of the demo world: other seeds for training and test."""
    from experiments import demo_world

    parts = []
    for num, seed in ((num_train, 1), (num_test, 2)):
        images, labels = demo_world.outline_shapes(num, seed=seed)
        parts.append((model.preprocess(list(images)), labels))
    return Task("outlines", list(demo_world.OUTLINE_SHAPES), "a photo of a {}", *parts)


def published(name: str, train: str, test: str) -> Task:
    """One of the six data sets: class names of the package, images at the user's places."""
    info = data.dataset_info(name)
    sources = [data.open_source(place) for place in (train, test)]
    names = [info.names_for(source.label_names) for source in sources]
    if names[0] != names[1]:
        raise LabelError(f"{train} and {test} do not have the same classes in the same order")
    return Task(name, list(names[0]), "a photo of a {}", *sources)


# --- one cell of the table ------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A task under one modality: what every strategy shares."""

    modality: prompt.Modality
    frozen: prompt.Frozen
    images: jax.Array
    labels: np.ndarray
    test_images: jax.Array
    test_labels: np.ndarray


def prepare(model: Model, task: Task, modality: str, settings: Settings) -> Prepared:
    """Frozen class features, constant images of pool and test set."""
    chosen = MODALITIES[modality](length=settings.lengths[modality])
    frozen = prompt.freeze(
        model,
        chosen,
        task.class_names,
        template=task.template,
        literal_braces=settings.literal_braces,
    )
    parts: list[Any] = []
    for images in (task.train, task.test):
        if isinstance(images, tuple):
            pixels, labels = images
            constant = prompt.constant_images(chosen, frozen.params, pixels, model.config)
            parts += [constant, labels]
        else:
            parts += prompt.read_source(model, chosen, images)
    return Prepared(chosen, frozen, *parts)


def splits(given: Prepared, num_classes: int, paradigm: str, runs: int) -> list[prompt.Split]:
    """One split in SSL and UL; in TRZSL one for each run, from the published seeds."""
    if paradigm == "ssl":
        return [prompt.ssl_split(given.labels, num_classes)]
    if paradigm == "ul":
        return [prompt.ul_split(len(given.labels), num_classes, given.labels)]
    seeds = [SPLIT_SEEDS[r % len(SPLIT_SEEDS)] for r in range(runs)]
    return [prompt.trzsl_split(given.labels, num_classes, seed) for seed in seeds]


def zero_shot(model: Model, given: Prepared, own_splits: list[prompt.Split]) -> dict[str, Any]:
    """Zero-shot CLIP on the test images, once a class split, and its predictions."""
    logits = prompt.plain_logits(
        given.modality, given.frozen.text_features, given.frozen, given.test_images, model.config
    )
    predictions = logits.argmax(1)
    results = [
        prompt.evaluate(predictions, given.test_labels, s.seen if s.paradigm == "trzsl" else None)
        for s in own_splits
    ]
    return {"test": [dataclasses.asdict(r) for r in results], "predictions": predictions.tolist()}


def tune(
    model: Model,
    given: Prepared,
    own_splits: list[prompt.Split],
    plan: prompt.Plan,
    seeds: tuple[int, ...],
    state: Path,
) -> dict[str, Any]:
    """One cell: all seeds together. Records of every iteration, and predictions of each seed on the test images."""
    began = time.monotonic()
    fitted = prompt.fit(
        given.modality,
        given.frozen,
        given.images,
        own_splits,
        model.config,
        plan,
        labels=given.labels,
        seeds=seeds,
        test=(given.test_images, given.test_labels),
        resume=state,
        on_record=lambda r: print(f"    iteration {r.iteration}: {r.seconds:.0f} s", flush=True),
    )
    logits = prompt.score(
        given.modality, fitted.prompts, given.frozen, given.test_images, model.config
    )
    return {
        "test": [dataclasses.asdict(r) for r in fitted.records[-1].test or []],
        "records": [dataclasses.asdict(r) for r in fitted.records],
        "predictions": logits.argmax(2).tolist(),
        "seconds": round(time.monotonic() - began, 1),
    }


# --- tables -----------------------------------------------------------------------------------------------


def headline(test: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean and standard deviation over runs of the harmonic mean (TRZSL) or the accuracy, in %."""
    values = [100 * prompt.Evaluation(**one).headline for one in test]
    return float(np.mean(values)), float(np.std(values))


def table(cells: dict[str, Any], name: str) -> str:
    """Rows: zero-shot, then modality and strategy. Columns: SSL, TRZSL, UL, published ones where there are any."""
    rows = []
    theirs = PUBLISHED.get(name, {})
    wanted = [("zero-shot", "zero-shot {paradigm}")]
    wanted += [(f"{m} {s}", f"{m} {{paradigm}} {s}") for m in MODALITIES for s in STRATEGIES]
    for label, key in wanted:
        row = [label]
        for paradigm in PARADIGMS:
            cell = cells.get(key.format(paradigm=paradigm))
            row.append("" if cell is None else "{:.1f} ± {:.1f}".format(*headline(cell["test"])))
        if theirs:
            ssl, ul, trzsl = theirs.get(label, (None, None, None))
            row += ["" if value is None else f"{value:.1f}" for value in (ssl, trzsl, ul)]
        if any(row[1:]):
            rows.append(row)
    header = ["method", "SSL", "TRZSL", "UL"]
    header += ["SSL published", "TRZSL published", "UL published"] if theirs else []
    return markdown_table(header, rows)


def per_class(cells: dict[str, Any], task: Task, labels: np.ndarray, folder: Path) -> str:
    """Who gains: bottom and top quarter of the classes, mean over runs; and a plot for GRIP of every modality."""
    rows = []
    before = np.array(cells["zero-shot ul"]["predictions"])
    for key, cell in cells.items():
        if key.startswith("zero-shot") or " ul " not in key:
            continue
        found = [prompt.robin_hood(before, np.array(p), labels) for p in cell["predictions"]]
        mean = lambda f, found=found: float(np.mean([f(one) for one in found]))  # noqa: E731
        rows.append(
            [
                key,
                100 * mean(lambda r: r.bottom_gain),
                100 * mean(lambda r: r.top_gain),
                100 * mean(lambda r: r.deviation_zero_shot),
                100 * mean(lambda r: r.deviation_tuned),
                mean(lambda r: r.slope),
            ]
        )
        if key.endswith("grip"):
            modality = key.split()[0]
            prompt.plot_robin_hood(
                found[0], task.class_names, folder / f"{task.name}_{modality}_grip.png"
            )
    header = ["method", "poorest quarter", "richest quarter", "std zero-shot", "std tuned", "slope"]
    return markdown_table(header, rows)


# --- the whole experiment ----------------------------------------------------------------------------------


def size_of(images: Images) -> int:
    return len(images[1]) if isinstance(images, tuple) else len(images)


def run_task(model: Model, task: Task, settings: Settings, options: argparse.Namespace) -> None:
    """Every cell that is asked for and not there yet; then the tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{task.name}.json"
    seeds = tuple(options.seeds)
    protocol = {
        "fingerprint": model.fingerprint,
        "class_names": task.class_names,
        "template": task.template,
        "train": size_of(task.train),
        "test": size_of(task.test),
        "seeds": list(seeds),
        "split_seeds": list(SPLIT_SEEDS),
        "k": settings.k,
        "iterations": settings.iterations,
        "literal_braces": settings.literal_braces,
        "optimisation": dataclasses.asdict(settings.optimisation),
        "lengths": settings.lengths,
    }
    kept = json.loads(file.read_text()) if file.exists() else {}
    cells: dict[str, Any] = kept.get("cells", {}) if kept.get("protocol") == protocol else {}

    def keep(key: str, cell: dict[str, Any]) -> None:
        cells[key] = cell
        whole = {"protocol": protocol, "environment": environment(), "cells": cells}
        write_json(file, whole)
        mean, deviation = headline(cell["test"])
        print(f"  {task.name} {key}: {mean:.1f} ± {deviation:.1f}", flush=True)

    for modality in options.modalities:
        given = prepare(model, task, modality, settings)
        for paradigm in options.paradigms:
            own_splits = splits(given, len(task.class_names), paradigm, len(seeds))
            if f"zero-shot {paradigm}" not in cells:
                keep(f"zero-shot {paradigm}", zero_shot(model, given, own_splits))
            for strategy in options.strategies:
                key = f"{modality} {paradigm} {strategy}"
                if key in cells or (paradigm, strategy) == ("ul", "labelled"):
                    continue
                state = options.out / f".{task.name}-{key.replace(' ', '-')}.safetensors"
                plan = prompt.Plan(
                    strategy, settings.k, settings.iterations, optimisation=settings.optimisation
                )
                keep(key, tune(model, given, own_splits, plan, seeds, state))
                state.unlink(missing_ok=True)
    text = [
        f"# {task.name}: prompt tuning with pseudolabels",
        "",
        f"`python -m experiments.prompt_tuning {shlex.join(sys.argv[1:])}`: {protocol['train']} images to learn from, "
        f"{protocol['test']} to test on, seeds {', '.join(map(str, seeds))}; mean ± standard deviation, %. "
        "TRZSL: harmonic mean of seen and unseen classes.",
        f"Model {model.name}, {settings.optimisation.epochs} epochs a training, {settings.iterations} iterations, "
        f"K = {settings.k} (FPL, IFPL), prompt lengths {settings.lengths}.",
        "",
        table(cells, task.name),
    ]
    if "zero-shot ul" in cells:
        text += [
            "",
            "Change per class (UL), points:",
            "",
            per_class(cells, task, given.test_labels, options.out),
        ]
    (options.out / f"{task.name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        nargs="+",
        default=["digits", "outlines"],
        choices=["digits", "outlines", *PUBLISHED],
    )
    parser.add_argument("--train", help="images to learn from, of a published data set")
    parser.add_argument("--test", help="its test images")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--modalities", nargs="+", default=list(MODALITIES), choices=list(MODALITIES)
    )
    parser.add_argument("--paradigms", nargs="+", default=list(PARADIGMS), choices=PARADIGMS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="of a training, instead of the setting's")
    parser.add_argument("--iterations", type=int, help="of IFPL and GRIP, instead of the setting's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = load(options.model)
    for name in options.data:
        settings = OFFICIAL if name in PUBLISHED else DEMO
        if options.epochs:
            settings = settings._replace(
                optimisation=dataclasses.replace(settings.optimisation, epochs=options.epochs)
            )
        if options.iterations:
            settings = settings._replace(iterations=options.iterations)
        if name in PUBLISHED:
            if not options.train or not options.test:
                parser.error(f"{name} needs --train and --test")
            task = published(name, options.train, options.test)
        else:
            task = {"digits": digits, "outlines": outlines}[name](model)
        run_task(model, task, settings, options)


if __name__ == "__main__":
    main()
