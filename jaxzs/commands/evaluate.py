"""`jaxzs evaluate --data NAME=PLACE ...`: many models, data sets, settings and methods in one table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import (
    ComputeOptions,
    File,
    Flag,
    OutputOptions,
    check_numbers,
    check_output_file,
    check_output_folder,
    read_templates,
    shown_as,
)
from jaxzs.commands.run import command_line
from jaxzs.commands.terminal import counted, explained
from jaxzs.errors import ConfigError, DataError, JaxzsError, TextError

if TYPE_CHECKING:
    from jaxzs.clip import Model
    from jaxzs.data import Source
    from jaxzs.evaluation import Cell, Labelled, Method, Run
    from jaxzs.report import Record

WITH_SHOTS = ("zero-shot", "auto", "gda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(OutputOptions, ComputeOptions):
    data: Annotated[tuple[str, ...], shown_as("NAME=PLACE ...")] = ()
    """Folders with one subfolder a class, feature stores, or .npz files of image_features, labels, text_features."""
    model: Annotated[tuple[str, ...], shown_as("MODEL ...")] = ("demo",)
    """Checkpoints that encode folders and the class names; .npz files bring their features."""
    method: Annotated[tuple[str, ...], shown_as("METHOD ...")] = ("zero-shot", "auto", "proxy", "stata", "gda")
    """Of zero-shot, auto, uniform (InMaP as published), proxy, closed_form, gda, stata, transclip."""
    shots: Annotated[tuple[int, ...], shown_as("N ...")] = (0,)
    """Images of each class whose labels auto and gda are told; these are not measured."""
    seeds: int = 1
    """How often a regime or the shots are drawn: with the seeds 0, 1, and so on."""
    regime: Annotated[tuple[str, ...], shown_as("REGIME ...")] = ("full",)
    """full, balanced:16 (of each class), imbalanced:20 (largest to smallest), present:10 or present:10x30 (classes)."""
    templates: Annotated[tuple[str, ...], shown_as("TEXT ...")] = ()
    """Sentences with {}, or sets simple, imagenet7, imagenet80, tagclip85; by default "a photo of a {}"."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("results")
    """Folder of the records, one for each model and data set, of evaluate.md, and of features that were encoded."""
    html: File = None
    """Write a page to look at in a browser: figures of all cells, plots of seed 0."""
    skip_existing: Flag = False
    """Keep the cells of the records that are there, made with the same settings, model and data."""


def run(options: EvaluateOptions) -> int:
    """Measure every cell and print the table; what is finished is kept, whatever stops the rest.

    Returns 0, or 1 when some images could not be read, or some cells not be measured.
    """
    _check(options)
    try:
        return _evaluate(options)
    except KeyboardInterrupt as stop:
        kept = f"the records in {options.out} keep the finished cells, --skip-existing goes on from there"
        raise KeyboardInterrupt(kept) from stop


def _evaluate(options: EvaluateOptions) -> int:
    from jaxzs.clip import load
    from jaxzs.evaluation import table
    from jaxzs.files import atomic_path
    from jaxzs.report.records import json_values

    # Always with zero-shot, which the table compares every method with.
    methods = cast("tuple[Method, ...]", tuple(dict.fromkeys(("zero-shot", *options.method))))
    found: list[Cell] = []
    records: list[Record] = []
    unreadable: set[str] = set()
    failures = Failures(options.notice)
    load_once = functools.cache(load)
    pairs = [(name, place, model) for name, place, models in _listed(options) for model in models]
    for name, place, model_name in pairs:
        # One that cannot be used must not take the others with it.
        with failures.told():
            model = None if model_name is None else load_once(model_name)
            data = _labelled(options, model, name, place, unreadable)
            own, record = _measured(options, methods, model, data, failures)
            found += own
            records += [] if record is None else [record]
    if not found:
        raise failures.first
    missing = len(pairs) * sum(len(_runs(options, method)) for method in methods) - len(found)
    methods = tuple(method for method in methods if any(cell.method == method for cell in found))
    text = table(found, methods)
    with atomic_path(options.out / "evaluate.md") as temporary:
        temporary.write_text(f"`{command_line(options)}`\n\n{text}\n", encoding="utf-8")
    options.say(text)
    options.say(f"{counted(len(found), 'cell')}, records and evaluate.md in {options.out}")
    if options.html is not None:
        _write_page(options, records)
    rows = [cell.row for cell in found]
    options.print_record({"command": command_line(options), "cells": json_values(rows)})
    if unreadable:
        options.notice(f"{counted(len(unreadable), 'image')} could not be read, the first: {min(unreadable)}")
    if missing:
        options.notice(f"{counted(missing, 'cell')} could not be measured, the first: {explained(failures.first)}")
    return INCOMPLETE if unreadable or missing else FINISHED


class Failures:
    """Why some cells could not be measured; each reason is told once."""

    def __init__(self, notice: Callable[[str], None]):
        self.notice = notice
        self.reasons: dict[str, Exception] = {}

    @property
    def first(self) -> Exception:
        return next(iter(self.reasons.values()))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What is wrong with what was given to the block is told, and the command goes on behind it."""
        try:
            yield
        except Exception as error:
            reason = explained(error)
            if reason is None:  # a fault of ours
                raise
            if reason not in self.reasons:
                self.notice(f"not measured: {reason}")
            self.reasons.setdefault(reason, error)


def _measured(
    options: EvaluateOptions, methods: Sequence[Method], model: Model | None, data: Labelled, failures: Failures
) -> tuple[list[Cell], Record | None]:
    """The cells of a data set and a model, and their record; None where there is no cell."""
    from jaxzs.evaluation import cells, images_of
    from jaxzs.report import Sweep
    from jaxzs.report.records import parse_record
    from jaxzs.report.results import renamed

    where = _place(data.name, None if model is None else model.name)
    sweep = Sweep(
        options.out / f"{where}.json",
        command=command_line(options),
        settings={"temperature": data.temperature, "templates": list(options.templates)},
        model=model,
        data=data.entry,
        skip_existing=options.skip_existing,
        notify=options.notice,
    )
    found: dict[str, Cell] = {}
    for method in methods:
        runs = []
        for run in _runs(options, method):
            with failures.told():
                images_of(data, run)
                runs.append(run)
        # The text's failure is that of all: there is nothing to compare others with.
        with failures.told() if method != "zero-shot" else contextlib.nullcontext():
            for key, cell in cells(sweep, data, method, runs).items():
                found[key] = cell._replace(data=where)
                options.notice(f"{where} {key}: {cell.results.metrics['accuracy']:.2f} %")
    if not found:
        return [], None
    asked = {key: sweep.cells[key] for key in found}  # a record keeps cells of earlier runs, too
    record = parse_record({**sweep.finish(), "cells": asked}, options.out / f"{where}.json")
    # Pictures of one data set under several models have titles of their own.
    return list(found.values()), dataclasses.replace(record, results=renamed(record.results, where))


def _place(name: str, model: str | None) -> str:
    """What the record of a model and its data is called: hub ids have slashes, names of files have none."""
    return (name if model is None else f"{model}-{name}").replace("/", "-")


def _runs(options: EvaluateOptions, method: str) -> list[Run]:
    from jaxzs.evaluation import Run

    # The other methods know no labels.
    shots = [own for own in options.shots if not own or method in WITH_SHOTS]
    seeds = range(options.seeds)
    asked = [Run(regime, seed, own) for own in shots for regime in options.regime for seed in seeds]
    return list(dict.fromkeys(asked))


def _write_page(options: EvaluateOptions, records: Sequence[Record]) -> None:
    """The figures of all cells, and the plots, which are left in OUT/plots."""
    from jaxzs.report import write_page
    from jaxzs.report.summary import draw, rows_of

    folder = options.out / "plots"
    plots = [(title, folder / name) for title, name in draw(records, rows_of(records), folder)]
    figures = [dataclasses.asdict(figure) for record in records for figure in record.results.figures]
    assert options.html is not None  # asked for
    write_page(options.html, {"command": command_line(options), "figures": figures}, plots=plots)
    options.say(f"page with {counted(len(plots), 'plot')} written to {options.html}")


def _check(options: EvaluateOptions) -> None:
    import numpy as np

    from jaxzs.evaluation import METHODS, drawn

    check_numbers(options, "seeds")
    if not options.data:
        raise DataError("no data given: --data NAME=FOLDER, NAME=STORE or NAME=FILE.npz, one or several")
    for one in options.data:
        name, _, place = one.partition("=")  # at the first "=": places may have one, too
        if not name or not place:
            raise ConfigError(f"--data {one!r}: expected NAME=PLACE, such as pets=photos/pets")
        if not Path(place).exists():
            raise DataError(f"--data {one}: there is no {place}")
    for method in options.method:
        if method not in METHODS:
            raise ConfigError(f"--method {method!r}: expected some of {', '.join(METHODS)}")
    for shots in options.shots:
        if shots < 0:
            raise ConfigError(f"--shots {shots}: expected 0 or more")
    if without := [method for method in options.method if method not in WITH_SHOTS and 0 not in options.shots]:
        raise ConfigError(f"--method {' '.join(without)} takes no shots; add 0 to --shots, or leave it out")
    places = [_place(name, model) for name, _, models in _listed(options) for model in models]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise ConfigError(f"two records would be called {', '.join(twice)}: give each --data a NAME of its own")
    for regime in options.regime:
        drawn(regime, np.zeros(1, int), 1, 0)  # raises for a regime that there is not
    check_output_folder(options.out)
    check_output_file(options.html, ".html", name="html")


def _listed(options: EvaluateOptions) -> Iterator[tuple[str, str, tuple[str | None, ...]]]:
    """Name and place of every data set, and its models; features that are there already belong to none."""
    for one in options.data:
        name, _, place = one.partition("=")
        yield name, place, (None,) if _is_features(place) else tuple(dict.fromkeys(options.model))


def _is_features(place: str) -> bool:
    """Whether a file brings its text features, so that no model is asked."""
    return Path(place).suffix.lower() == ".npz"


def _labelled(options: EvaluateOptions, model: Model | None, name: str, place: str, unreadable: set[str]) -> Labelled:
    """A data set as a model sees it; unreadable: images that had to be left out, which is told, are added."""
    from jaxzs.evaluation import read_features

    if model is None:
        return read_features(Path(place), name)
    try:
        return _encoded(options, model, name, place, unreadable)
    except JaxzsError as error:
        raise error.within(f"--data {name}={place}") from error


def _encoded(options: EvaluateOptions, model: Model, name: str, place: str, unreadable: set[str]) -> Labelled:
    """Features of a folder, encoded once into OUT/features, or of a store."""
    import numpy as np

    from jaxzs import zeroshot
    from jaxzs.evaluation import Labelled
    from jaxzs.features import extract, open_store

    # The store itself, or the folder that `jaxzs extract` has put one into.
    is_store = (Path(place) / "store.json").exists() or any(Path(place).glob("*/store.json"))
    store = open_store(place) if is_store else extract(model, _opened(options, name, place), options.out / "features")
    if is_store and store.settings.get("weights") != model.fingerprint:
        raise DataError(f"it holds features of another checkpoint than {model.name}")
    names = [label.replace("_", " ") for label in store.label_names]
    if len(names) < 2:
        raise DataError(
            f"it has {counted(len(names), 'class', 'classes')}: expected one subfolder a class, two at least"
        )
    try:
        model.check_words(names)
    except TextError as error:  # there is nothing to force: the numbers are what they are
        options.notice(f"note: {name}: {error.message}")
    kept = store.arrays()
    unreadable.update(kept.skipped)
    labels = np.asarray(kept.labels)
    if labels.ndim != 1:
        raise DataError("it has several labels an image: expected one")
    templates = read_templates(options.templates) or (zeroshot.DEFAULT_TEMPLATE,)
    text = np.asarray(zeroshot.text_proxies(model, names, templates))  # [C,E]
    known = labels >= 0  # -1: without a label
    if not known.all():
        options.notice(f"{name}: {counted(int((~known).sum()), 'image')} without a label left out")
    return Labelled(
        name,
        np.asarray(kept.features, np.float32)[known],  # [N,E]
        labels[known],  # [N]
        text,
        str(store.path.name),
        float(1 / model.logit_scale),
        tuple(names),
    )


def _opened(options: EvaluateOptions, name: str, place: str) -> Source:
    """The images of a folder; what lies there and is not taken is told."""
    from jaxzs.data import open_source

    source = open_source(place)
    passed = getattr(source, "passed_over", None)
    for line in () if passed is None else passed.notices():
        options.notice(f"{name}: {line}")
    return source
