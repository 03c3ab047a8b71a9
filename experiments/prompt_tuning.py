"""Prompt tuning with pseudolabels: zero-shot, labels alone, FPL, IFPL and GRIP, for every modality and paradigm.

On the demo checkpoint, with real handwritten digits (scikit-learn's) and with outline shapes, a style it never saw:

    python -m experiments.prompt_tuning --data digits outlines

On the checkpoint "art", with drawings by an artist that it never saw (`experiments.art_world.sprites` reads them):

    python -m experiments.prompt_tuning --data art --model art --paradigms ul

On one of the six published data sets, with the published settings, next to the published numbers:

    python -m experiments.prompt_tuning --data eurosat --train FOLDER/train --test FOLDER/test \\
        --model openai/clip-vit-base-patch32

Three seeds are trained together. In SSL and UL a seed is a draw of the initial prompts; in TRZSL it is one of the
published class splits (500, 0, 200) as well. Each cell is saved when it is finished, and an interrupted one goes on
where it was; with --skip-existing, cells of the same settings, model and data are not computed again. Tables, plots and
records go to results/prompt_tuning/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxzs import data, load, prompt, report
from jaxzs.clip import Model
from jaxzs.errors import LabelError
from jaxzs.prompt.files import MODALITIES
from jaxzs.prompt.protocol import SPLIT_SEEDS
from jaxzs.report import Results, Sweep, curves, data_entry, markdown_table
from jaxzs.report.plots import plot_per_class
from jaxzs.report.published import published_values

RESULTS = Path(__file__).parent / "results" / "prompt_tuning"
PARADIGMS = ("ssl", "trzsl", "ul")
STRATEGIES = ("labelled", "fpl", "ifpl", "grip")

PUBLISHED = ("flowers102", "resisc45", "fgvc_aircraft", "mnist", "eurosat", "dtd")


class Settings(NamedTuple):
    """What differs between the demo and the published runs."""

    lengths: dict[str, int]  # tokens of a prompt, by modality
    k: int
    iterations: int
    literal_braces: bool
    optimisation: prompt.Optimisation


OFFICIAL = Settings({"text": 16, "image": 16, "joint": 4}, 16, 10, True, prompt.Optimisation())
# The demo checkpoint takes 32 tokens and a CPU must do; its small vocabulary makes nothing of braces.
DEMO = Settings({"text": 8, "image": 8, "joint": 4}, 8, 3, False, prompt.Optimisation(epochs=8, warmup_epochs=1))


Images = tuple[np.ndarray, np.ndarray] | data.Source  # (pixels, labels), or read when a modality asks


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


def art(model: Model, classes: int = 40, num_train: int = 16, num_test: int = 12) -> Task:
    """Everyday things by the artist that the checkpoint "art" never saw: other seeds for training and test."""
    from experiments.art_world.names import NAMES
    from experiments.art_world.tests import things, unseen

    artist, parts = unseen("jaxzs-out/art/sprites.npz"), []
    for each, seed in ((num_train, 1), (num_test, 2)):
        images, labels = things(artist, each, classes=classes, seed=seed)
        parts.append((model.preprocess(list(images)), labels))
    return Task("art", list(NAMES[:classes]), "a photo of a {}", *parts)


MADE = {"digits": digits, "outlines": outlines, "art": art}


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

    task: prompt.Task
    frozen: prompt.Frozen
    pool: prompt.Pool
    test: prompt.Pool


def prepare(model: Model, task: Task, modality: str, settings: Settings) -> Prepared:
    """Frozen class features, constant images of pool and test set."""
    chosen = MODALITIES[modality](length=settings.lengths[modality])
    frozen = prompt.freeze(
        model, chosen, task.class_names, template=task.template, literal_braces=settings.literal_braces
    )
    parts: list[prompt.Pool] = []
    for images in (task.train, task.test):
        if isinstance(images, tuple):
            pixels, labels = images
            constant = prompt.constant_images(chosen, frozen.params, pixels, model.config)
            parts.append(prompt.Pool(constant, labels))
        else:
            parts.append(prompt.read_source(model, chosen, images))
    return Prepared(prompt.Task(chosen, model.config), frozen, *parts)


def splits(given: Prepared, num_classes: int, paradigm: str, runs: int) -> list[prompt.Split]:
    """One split in SSL and UL; in TRZSL one for each run, from the published seeds."""
    if paradigm == "ssl":
        return [prompt.ssl_split(given.pool.labels, num_classes)]
    if paradigm == "ul":
        return [prompt.ul_split(len(given.pool.labels), num_classes, given.pool.labels)]
    seeds = [SPLIT_SEEDS[r % len(SPLIT_SEEDS)] for r in range(runs)]
    return [prompt.trzsl_split(given.pool.labels, num_classes, seed) for seed in seeds]


def zero_shot(model: Model, task: Task, given: Prepared, own_splits: list[prompt.Split]) -> Results:
    """Zero-shot CLIP on the test images, once a class split, and its predictions."""
    logits = prompt.plain_logits(given.task, given.frozen.text_features, given.frozen, given.test.images)
    predictions = logits.argmax(1)
    results = [
        prompt.evaluate(predictions, given.test.labels, s.seen if s.paradigm == "trzsl" else None) for s in own_splits
    ]
    protocol = own_splits[0].paradigm.upper()
    return Results(
        {"test": [dataclasses.asdict(r) for r in results], "predictions": predictions.tolist()},
        figures=(curves.evaluated(task.name, "zero-shot", results, protocol),),
    )


def tune(
    model: Model,
    task: Task,
    given: Prepared,
    own_splits: list[prompt.Split],
    plan: prompt.Plan,
    seeds: tuple[int, ...],
    state: Path,
    before: list[int],
) -> Results:
    """One cell: all seeds together. Records of every iteration, and predictions of each seed on the test images.

    before: zero-shot predictions.
    """
    plan = dataclasses.replace(plan, seeds=seeds)
    running = prompt.Running(
        resume=state, on_record=lambda r: print(f"    iteration {r.iteration}: {r.seconds:.0f} s", flush=True)
    )
    fitted = prompt.fit(given.task, given.frozen, given.pool, own_splits, plan, running, test=given.test)
    logits = prompt.score(given.task, fitted.prompts, given.frozen, given.test.images)
    state.unlink(missing_ok=True)
    predictions, test = logits.argmax(2), fitted.records[-1].test or []
    method, protocol = (f"{given.task.modality.name} {plan.strategy}", own_splits[0].paradigm.upper())
    per_class = curves.per_class(task.name, method, task.class_names, before, predictions, given.test.labels, protocol)
    return Results(
        {
            "test": [dataclasses.asdict(r) for r in test],
            "records": [dataclasses.asdict(r) for r in fitted.records],
            "predictions": predictions.tolist(),
        },
        figures=(curves.evaluated(task.name, method, test, protocol),),
        per_class=(per_class,) if (protocol, plan.strategy) == ("UL", "grip") else (),
        pseudolabels=curves.pseudolabels(task.name, method, fitted.records, protocol),
    )


# --- tables -----------------------------------------------------------------------------------------------


def table(cells: dict[str, Results], name: str) -> str:
    """Rows: zero-shot, then modality and strategy. Columns: SSL, TRZSL, UL, published ones where there are any."""
    measured = {(figure.method, figure.protocol): figure for cell in cells.values() for figure in cell.figures}
    theirs = {(method, of): value for (method, _, of), value in published_values(name).items()}
    rows = []
    for label in ["zero-shot", *(f"{m} {s}" for m in MODALITIES for s in STRATEGIES)]:
        row = [label]
        for paradigm in PARADIGMS:
            figure = measured.get((label, paradigm.upper()))
            spread = 0.0 if figure is None else figure.deviation or 0.0
            row.append("" if figure is None else f"{figure.value:.1f} ± {spread:.1f}")
        if theirs:
            values = [theirs.get((label, paradigm.upper())) for paradigm in PARADIGMS]
            row += ["" if value is None else f"{value:.1f}" for value in values]
        if any(row[1:]):
            rows.append(row)
    header = ["method", "SSL", "TRZSL", "UL"]
    header += ["SSL published", "TRZSL published", "UL published"] if theirs else []
    return markdown_table(header, rows)


def gains_table(cells: dict[str, Results], labels: np.ndarray) -> str:
    """Who gains without labels: bottom and top quarter of the classes, mean over runs."""
    rows = []
    before = np.array(cells["zero-shot ul"].metrics["predictions"])
    for key, cell in cells.items():
        if key.startswith("zero-shot") or " ul " not in key:
            continue
        found = [report.robin_hood(before, np.array(p), labels) for p in cell.metrics["predictions"]]
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
    header = ["method", "poorest quarter", "richest quarter", "std zero-shot", "std tuned", "slope"]
    return markdown_table(header, rows)


# --- the whole experiment ----------------------------------------------------------------------------------


def size_of(images: Images) -> int:
    return len(images[1]) if isinstance(images, tuple) else len(images)


def identity_of(task: Task) -> str:
    """Hash of the images and labels to learn from and to test on."""
    digest = hashlib.sha256()
    for images in (task.train, task.test):
        if isinstance(images, tuple):
            for array in images:
                digest.update(np.ascontiguousarray(array))
        else:
            digest.update(images.identity.encode())
    return digest.hexdigest()


def run_task(model: Model, task: Task, settings: Settings, options: argparse.Namespace) -> None:
    """Every cell that is asked for; then the tables and plots."""
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = tuple(options.seeds)
    command = f"python -m experiments.prompt_tuning {shlex.join(sys.argv[1:])}".rstrip()
    train, test = size_of(task.train), size_of(task.test)
    sweep = Sweep(
        options.out / f"{task.name}.json",
        command=command,
        settings={
            "class_names": task.class_names,
            "template": task.template,
            "train": train,
            "test": test,
            "seeds": list(seeds),
            "split_seeds": list(SPLIT_SEEDS),
            "k": settings.k,
            "iterations": settings.iterations,
            "literal_braces": settings.literal_braces,
            "optimisation": dataclasses.asdict(settings.optimisation),
            "lengths": settings.lengths,
        },
        model=model,
        data=data_entry(task.name, identity_of(task), train + test),
        skip_existing=options.skip_existing,
    )
    cells: dict[str, Results] = {}

    def run_cell(key: str, compute: functools.partial[Results]) -> None:
        cells[key] = sweep.cell(key, compute)
        own = cells[key].figures[0]
        print(f"  {task.name} {key}: {own.value:.1f} ± {own.deviation or 0.0:.1f}", flush=True)

    for modality in options.modalities:
        given = prepare(model, task, modality, settings)
        for paradigm in options.paradigms:
            own_splits = splits(given, len(task.class_names), paradigm, len(seeds))
            plain = f"zero-shot {paradigm}"
            if plain not in cells:
                run_cell(plain, functools.partial(zero_shot, model, task, given, own_splits))
            before = cells[plain].metrics["predictions"]
            for strategy in options.strategies:
                if (paradigm, strategy) == ("ul", "labelled"):
                    continue
                key = f"{modality} {paradigm} {strategy}"
                state = options.out / f".{task.name}-{key.replace(' ', '-')}.safetensors"
                plan = prompt.Plan(strategy, settings.k, settings.iterations, optimisation=settings.optimisation)
                run_cell(key, functools.partial(tune, model, task, given, own_splits, plan, seeds, state, before))
    sweep.finish()
    for cell in cells.values():
        for result in cell.per_class:
            file = f"{task.name}_{result.method.replace(' ', '_')}.png"
            plot_per_class(options.out / file, result)
    text = [
        f"# {task.name}: prompt tuning with pseudolabels",
        "",
        f"`{command}`: {train} images to learn from, {test} to test on, "
        f"seeds {', '.join(map(str, seeds))}; mean ± standard deviation, %. "
        "TRZSL: harmonic mean of seen and unseen classes.",
        f"Model {model.name}, {settings.optimisation.epochs} epochs a training, {settings.iterations} iterations, "
        f"K = {settings.k} (FPL, IFPL), prompt lengths {settings.lengths}.",
        "",
        table(cells, task.name),
    ]
    if "zero-shot ul" in cells:
        text += ["", "Change per class (UL), points:", "", gains_table(cells, given.test.labels)]
    (options.out / f"{task.name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["digits", "outlines"], choices=[*MADE, *PUBLISHED])
    parser.add_argument("--train", help="images to learn from, of a published data set")
    parser.add_argument("--test", help="its test images")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--modalities", nargs="+", default=list(MODALITIES), choices=list(MODALITIES))
    parser.add_argument("--paradigms", nargs="+", default=list(PARADIGMS), choices=PARADIGMS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="of a training, instead of the setting's")
    parser.add_argument("--iterations", type=int, help="of IFPL and GRIP, instead of the setting's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--skip-existing", action="store_true", help="keep cells of the record")
    options = parser.parse_args()
    model = load(options.model)
    for name in options.data:
        settings = OFFICIAL if name in PUBLISHED else DEMO
        if options.epochs:
            settings = settings._replace(optimisation=dataclasses.replace(settings.optimisation, epochs=options.epochs))
        if options.iterations:
            settings = settings._replace(iterations=options.iterations)
        if name in PUBLISHED:
            if not options.train or not options.test:
                parser.error(f"{name} needs --train and --test")
            task = published(name, options.train, options.test)
        else:
            task = MADE[name](model)
        run_task(model, task, settings, options)


if __name__ == "__main__":
    main()
