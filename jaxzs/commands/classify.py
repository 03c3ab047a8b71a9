"""`jaxzs classify IMAGES --labels a,b,c`: a label for each image of a folder, as table, CSV or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from jaxzs.commands.measures import confusion_table, measures, say_labels
from jaxzs.commands.options import (
    LARGEST_SEED,
    ByPosition,
    File,
    Flag,
    Folder,
    Images,
    LabelOptions,
    ModelOptions,
    OutputOptions,
    check_numbers,
    check_output_file,
    check_output_folder,
    check_record_beside,
    left_out,
    one_of,
    option,
    read_templates,
    shown_as,
    told_apart,
)
from jaxzs.commands.run import Run
from jaxzs.commands.shots import rows_of as told_rows
from jaxzs.commands.shots import shots_of, told_labels
from jaxzs.commands.stream import label_as_they_come
from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxzs.adapt import KeptHead
    from jaxzs.classification import Classification, Labelling, Method
    from jaxzs.clip import Model
    from jaxzs.data import DatasetInfo, FolderSource
    from jaxzs.prompt import TunedPrompt
    from jaxzs.report import Results

    Encoder = Callable[[np.ndarray], jax.Array]


# Fewer than the library's: "learned" follows from --proxies, "closed_form" from auto.
_Asked = Literal["auto", "proxy", "gda", "stata", "transclip", "zero-shot"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions(OutputOptions, ModelOptions, LabelOptions):
    by_position: ByPosition = False
    images: Images = ()
    """Folders, files or globs. A folder with one subfolder a class also gives an accuracy."""
    prompt: File = None
    """A prompt that `jaxzs tune` has learned; its class names unless others are given, and no templates."""
    proxies: File = None
    """A head or proxies that --save has kept, with their class names: nothing is learned, one image is enough."""
    method: Annotated[_Asked | None, one_of(_Asked), shown_as()] = None
    """What suits these images (auto, the default), one method, or the text as it is (the default with --prompt)."""
    shots: Annotated[Path | None, left_out(Path), shown_as("DIR|TABLE")] = None
    """Images whose labels are known: a folder with one subfolder a class, or a table with some labels filled in."""
    templates: Annotated[tuple[str, ...], shown_as("TEXT ...")] = ()
    """Sentences with {}, or sets simple, imagenet7, imagenet80, tagclip85; else the data set's or "a photo of a {}"."""
    gamma: str = "auto"
    """Class balance assumed by --method proxy: 0 uniform, 1 as predicted by the text, or auto."""
    save: File = None
    """Keep what is learned in this .safetensors file, for --proxies."""
    top: int = 1
    """Classes listed for each image."""
    out: File = None
    """Write all results to this .csv or .json file; the record of the run lies beside a .csv file, as .json."""
    html: File = None
    """Write a page to look at in a browser: all images, counts, confusions, filters; one file, no network."""
    store: Folder = None
    """Keep image features in this folder: a run that is stopped goes on, a second one encodes nothing."""
    batch_size: int = 32
    """Images encoded at once."""
    stream: Flag = False
    """Label images as they arrive, until Ctrl-C: new ones in the folders, or paths on standard input (IMAGES is -)."""
    seed: int = 0
    """Of the random splits that are compared."""


def run(options: ClassifyOptions) -> int:
    """Classify and print; returns 0, or 1 when some images could not be read."""
    _check_options(options)
    if options.stream:  # without an end, hence without a record
        return label_as_they_come(options)
    import numpy as np

    from jaxzs.classification import check_number_of_classes, classify_features, paths_of, rows_of

    run = Run(options)
    with run.measured(kept=lambda: _kept(options)):
        source = run.open_images()
        # Before the model: what is wrong with the names is told before seconds of loading.
        given = options.class_names()
        model = run.load_model()
        learned = _learned(options, model)
        classes = _classes(run, given, source, learned)
        check_number_of_classes(len(classes.names), model.config.projection_dim)
        told = told_labels(run, classes.names)
        text, encode = _text(run, model, classes, learned)
        features, read = _encode(run, model, source, encode)
        here, shots = np.zeros(len(read), bool), None  # images to classify that are shots
        if told is not None:
            among = told_rows(told, source, read)
            here[among[among >= 0]] = True
            shots = shots_of(run, model, told, among, features, encode)
        # Images that are shots count once, as such.
        fitted = None if here.all() else ~here
        with run.step(f"comparing {counted(len(read), 'image')}, method {_method(options)}"):
            found = classify_features(model, features, text, _labelling(options, learned), shots, fitted)
    rows = rows_of(paths_of(source, read), classes.shown, found, options.top)
    truth = _truth_of(run, classes, read, here)
    if truth is not None:
        _add_truth(rows, classes, truth)
    run.write_table(options.out, *_table(rows))
    run.settings = {"method": found.method}  # the one really used, in place of the one asked for
    for note in filter(None, (*found.notes, found.chosen)):
        run.notice(f"note: {note}")
    results = _results(run, classes, found, (features, text), truth)
    record = run.record(results, class_names=list(classes.names), templates=list(classes.templates), rows=rows)
    run.write(record, options.out)
    run.write_page(record)
    say_labels(options, rows, in_file=options.out is not None)
    if "confusion" in results.metrics:
        options.say(confusion_table(results.metrics))
    run.wrote(counted(len(rows), "result"), options.out)
    _save(run, model, classes, found)
    return run.finish(record, _closing(rows, classes, found, results))


def _labelling(options: ClassifyOptions, learned: KeptHead | TunedPrompt | None) -> Labelling:
    """At least the five best classes are looked at, for the accuracy among five."""
    from jaxzs.adapt import KeptHead
    from jaxzs.classification import Labelling

    head = learned.head if isinstance(learned, KeptHead) else None
    gamma: float | Literal["auto"] = "auto" if options.gamma == "auto" else float(options.gamma)
    return Labelling(_method(options), gamma, top=max(5, options.top), seed=options.seed, head=head)


def _truth_of(run: Run, classes: _Classes, read: Sequence[int], told: np.ndarray) -> np.ndarray | None:
    """The true class of each image that was read [N], -1 where not known or told [N] bool; None where none is."""
    import numpy as np

    if classes.truth == ():  # there are folders, but named for something else
        run.notice("note: no subfolder is named as a class; no accuracy")
    if not classes.truth:
        return None
    truth = np.array([-1 if (place := classes.truth[number]) is None else place for number in read])  # [N]
    if told.any():
        run.notice(f"note: {counted(int(told.sum()), 'image')} of --shots not counted in the accuracy")
    return np.where(told, -1, truth)


def _add_truth(rows: Sequence[dict[str, Any]], classes: _Classes, truth: np.ndarray) -> None:
    for row, place in zip(rows, truth, strict=True):
        row["truth"] = classes.shown[place] if place >= 0 else None


def _kept(options: ClassifyOptions) -> str:
    if options.store is None:
        return "nothing is kept"
    return f"{options.store} keeps what was encoded, the same command goes on from there"


def _folders(source: FolderSource) -> list[str | None] | None:
    """The subfolder of each image, where one folder is given and its subfolders are classes; None for strays."""
    if not source.label_names:
        return None
    return [source.label_names[labels[0]] if labels else None for labels in source.labels]


def _learned(options: ClassifyOptions, model: Model) -> KeptHead | TunedPrompt | None:
    """Kept proxies, or a tuned prompt, if one of them is given."""
    from jaxzs.adapt import load_head
    from jaxzs.prompt import load_prompt

    if options.proxies is not None:
        return load_head(options.proxies, model)
    return None if options.prompt is None else load_prompt(options.prompt, model)


def _text(
    run: Run, model: Model, classes: _Classes, learned: KeptHead | TunedPrompt | None
) -> tuple[jax.Array, Encoder | None]:
    """What images are compared with [C,E], and an encoder of images where it is not the model's own."""
    import jax.numpy as jnp

    from jaxzs import zeroshot
    from jaxzs.adapt import GaussianHead
    from jaxzs.prompt import TunedPrompt, prompted_encoders

    options = run.options
    # A head that was kept: its weights stand for the text, which is not encoded again.
    if learned is not None and not isinstance(learned, TunedPrompt):
        head = learned.head
        weights = jnp.asarray((head.prior if isinstance(head, GaussianHead) else head).weights)  # [C,E]
        zeroshot.check_proxies(weights, classes.names)
        return weights, None
    if not options.force:
        model.check_words(classes.names)
    if learned is not None:
        # [C,E], and its own encoder of images.
        return prompted_encoders(model, learned, classes.names, numerics=options.numerics)
    text = zeroshot.text_proxies(
        model, classes.names, classes.templates, numerics=options.numerics, progress=not options.quiet
    )
    return text, None


def _check_options(options: ClassifyOptions) -> None:
    if options.prompt is not None and (options.templates or options.store):
        raise DataError("--prompt replaces --templates, and its features are not kept in a --store; leave these out")
    if options.stream:
        others = "proxies", "method", "shots", "save", "out", "html", "store", "templates", "json", "top", "gamma"
        also = [o for o in ("prompt", *others) if getattr(options, o) != getattr(ClassifyOptions, o)]
        if also:
            shown = ", ".join(map(option, also))
            raise DataError(f"--stream labels batches by StatA and takes no {shown}; leave these out")
    if options.gamma != "auto":
        try:
            valid = 0 <= float(options.gamma) <= 1  # False for NaN
        except ValueError:
            valid = False
        if not valid:
            raise DataError(f"--gamma is {options.gamma!r}, expected 0 to 1, or auto")
        if _method(options) != "proxy":
            raise DataError(f"--gamma is of --method proxy, not of {_method(options)}; leave it out")
    check_numbers(options, "batch_size", "top")
    check_numbers(options, "seed", least=0, most=LARGEST_SEED)
    check_output_file(options.out, ".csv", ".json")
    check_record_beside(options.out)
    check_output_folder(options.store, "store")
    check_output_file(options.save, ".safetensors", name="save")
    check_output_file(options.html, ".html", name="html")
    if options.save is not None and _method(options) in ("zero-shot", "learned"):
        raise DataError("--save keeps learned heads, but none are learned here; leave it out")
    if options.shots is not None and _method(options) not in ("auto", "gda"):
        raise DataError("--shots is used by --method auto and gda; leave it out")
    if options.proxies is not None:
        replaced = "prompt", "method", "templates", "labels", "labels_file", "dataset"
        also = [option(name) for name in replaced if getattr(options, name)]
        if also:
            raise DataError(f"--proxies brings its class names and replaces {', '.join(also)}; leave these out")


def _method(options: ClassifyOptions) -> Method:
    """As asked; else what suits the images, unless there is something better than names: a head, or a prompt."""
    if options.proxies is not None:
        return "learned"
    if options.method is None and options.gamma != "auto":
        return "proxy"  # the balance is that of proxies
    return options.method or ("auto" if options.prompt is None else "zero-shot")


class _Classes(NamedTuple):
    """Class names, templates, and the class that each image's subfolder names.

    truth: None without subfolders, empty where none of them names a class. shown: names that tell the classes apart.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    truth: tuple[int | None, ...] | None
    shown: tuple[str, ...]


def _classes(
    run: Run, given: tuple[str, ...] | None, source: FolderSource, learned: TunedPrompt | KeptHead | None
) -> _Classes:
    """As given, of a known data set, of the tuned prompt or kept proxies, or the names of the subfolders."""
    from jaxzs import zeroshot
    from jaxzs.data import order_names

    templates, info, folders = read_templates(run.options.templates), run.options.dataset_info(), _folders(source)
    found = order_names(folder for folder in folders or () if folder is not None)
    if info is not None:
        truth = _of_dataset(run, info, folders, found)
        return _Classes(info.class_names, templates or info.templates, truth, told_apart(info))
    if given is not None:
        names = given
    elif learned is not None:
        names = learned.class_names
    elif found:
        # Two folders may be one name, such as hot_dog and "hot dog".
        names = tuple(dict.fromkeys(folder.replace("_", " ") for folder in found))
        run.notice(f"class names taken from the subfolders: {', '.join(names)}")
    else:
        from jaxzs.classification import split_hint

        hint = split_hint(source.files)
        raise LabelError(f"what are the classes? Give --labels a,b,c, --labels-file or --dataset{hint}")
    zeroshot.check_class_names(names)
    return _Classes(names, templates or (zeroshot.DEFAULT_TEMPLATE,), _truth(run, names, folders, found), names)


def _truth(
    run: Run, names: Sequence[str], folders: Sequence[str | None] | None, found: Sequence[str]
) -> tuple[int | None, ...] | None:
    """The class of each image by its subfolder. Raises `LabelError` where only some of them name classes."""
    from jaxzs.data import match_names, match_places

    if folders is None:
        return None
    try:
        pairing = match_names(names, found, by_position=run.options.by_position)
    except LabelError as error:
        # Where only some folders are classes, somebody meant them; where none is, there is merely no accuracy.
        if run.options.by_position or any(place is not None for place in match_places(names, found)):
            advice = "to classify without an accuracy, name the images by a pattern, such as FOLDER/*/*.jpg"
            raise LabelError(error.message, python=str(error), command=f"{error.command}; {advice}") from error
        return ()
    run.tell_pairing(pairing)
    place_of = dict(zip(pairing.found, pairing.places, strict=True))
    return tuple(None if folder is None else place_of[folder] for folder in folders)


def _of_dataset(
    run: Run, info: DatasetInfo, folders: Sequence[str | None] | None, found: Sequence[str]
) -> tuple[int | None, ...] | None:
    """The same by the labels, names and aliases of a data set."""
    if folders is None:
        return None
    places = {folder: info.place(folder) for folder in found}
    if set(places.values()) == {None}:  # named for something else
        return ()
    info.names_for(found)  # says which of them are strangers
    return tuple(None if folder is None else places[folder] for folder in folders)


def _encode(run: Run, model: Model, source: FolderSource, encode: Encoder | None) -> tuple[jax.Array, Sequence[int]]:
    """Features [N,E] of the images that can be read, and their numbers.

    encode: instead of the model's own encoder. Raises `DataError` when no image can be read.
    """
    reading = _stored if run.options.store is not None else encode_files
    features, read, unreadable = reading(run.options, model, source, encode)
    run.skip(unreadable)
    run.check_any(read, "read")
    return features, read


def _stored(
    options: ClassifyOptions, model: Model, source: FolderSource, _: Encoder | None
) -> tuple[jax.Array, Sequence[int], list[str]]:
    """The same through a feature store, and why the other images cannot be read."""
    import jax.numpy as jnp

    from jaxzs.features import Extraction, extract

    assert options.store is not None  # `_encode` has seen to it
    # Any number of images may be unreadable: this command tells of them, and goes on.
    choices = Extraction(numerics=options.numerics, batch_size=options.batch_size, max_skipped=len(source))
    kept = extract(model, source, options.store, choices, progress=not options.quiet).arrays()
    return jnp.asarray(kept.features), kept.indices.tolist(), kept.skipped


def encode_files(
    options: ClassifyOptions, model: Model, source: FolderSource, encode: Encoder | None
) -> tuple[jax.Array, Sequence[int], list[str]]:
    """The same at once."""
    from jaxzs.classification import Encoding, encode_source

    return encode_source(model, source, Encoding(options.batch_size, options.numerics, not options.quiet, encode))


def _results(
    run: Run, classes: _Classes, found: Classification, compared: tuple[jax.Array, jax.Array], truth: np.ndarray | None
) -> Results:
    """Accuracy against the subfolders' classes [N], -1 where they are not known.

    compared: image features and text. Transductive: proxies were learned on these images, without labels.
    """
    import numpy as np

    from jaxzs import zeroshot
    from jaxzs.report import Figure, Results, curves

    metrics: dict[str, Any] = {"images": len(found.classes), "classes": len(classes.names)}
    if truth is None:
        return Results(metrics)
    known = truth >= 0  # [N]
    if not known.any():
        return Results(metrics | {"known": 0})
    metrics |= {
        "known": int(known.sum()),
        **measures(found.classes[known], found.scores[known, 0], truth[known], classes.shown),
    }
    method, protocol = _shown(run.options, found)
    predicted = {method: found.classes[:, 0]}
    # With a prompt or kept proxies there is no plain text to compare with.
    if run.options.prompt is None and run.options.proxies is None:
        predicted = {"zero-shot": np.asarray(zeroshot.predict(*compared)), **predicted}
    data = run.data["name"] if run.data else ""
    figures = [
        Figure(data, name, "accuracy", 100 * float((own == truth)[known].mean()), protocol)
        for name, own in predicted.items()
    ]
    per_class = []
    if len(predicted) > 1:  # something to compare with
        of = predicted["zero-shot"], predicted[method], truth, protocol
        per_class = [curves.per_class(data, method, classes.shown, *of)]
    right = (found.classes[:, 0] == truth)[known]
    calibration = curves.calibration(data, method, found.scores[known, 0], right, protocol)
    return Results(metrics, tuple(figures), tuple(per_class), reliability=(calibration,))


def _shown(options: ClassifyOptions, found: Classification) -> tuple[str, str]:
    """Method and protocol as tables and plots name them."""
    protocol = "kept proxies" if found.method == "learned" else "transductive"
    if options.prompt is not None:
        return "tuned prompt" + f" and {_named(found)}" * (found.method != "zero-shot"), protocol
    return _named(found), protocol


def _named(found: Classification) -> str:
    return {"proxy": "proxies", "learned": "proxies", "gda": "anchored GDA"}.get(found.method, found.method)


def _closing(rows: Sequence[dict[str, Any]], classes: _Classes, found: Classification, results: Results) -> str:
    """The last line: how many, by what, how well."""
    closing = f"{counted(len(rows), 'image')}, {counted(len(classes.names), 'class', 'classes')}, "
    closing += f"method {found.method}"
    if results.figures:
        known, own = results.metrics["known"], results.figures[-1]
        closing += f", accuracy {own.value:.2f} % on {counted(known, 'image')} ({own.protocol})"
    if len(results.figures) > 1:
        closing += f", zero-shot {results.figures[0].value:.2f} %"
    return closing


def _save(run: Run, model: Model, classes: _Classes, found: Classification) -> None:
    """The learned head, if it is to be kept; of one image there is none."""
    from jaxzs.adapt import KeptHead, save_head

    options = run.options
    if options.save is None:
        return
    if found.method == "zero-shot":
        run.notice(f"note: nothing was learned, {options.save} is not written")
        return
    settings = {"method": found.method, "images": len(found.classes), "bfloat16": options.bfloat16}
    if found.method == "proxy":
        settings["gamma"] = options.gamma
    save_head(options.save, KeptHead(found.head, classes.names, model.fingerprint, settings))
    options.say(f"head kept in {options.save}")


def _table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Header and cells: a line an image, with the truth where it is known, and all its classes."""
    truth = ["truth"] if "truth" in rows[0] else []
    header = ["path", "label", "score", *truth]
    # The best class is in front already; the others carry their rank.
    header += [f"{name}_{rank}" for rank in range(2, len(rows[0]["top"]) + 1) for name in ("label", "score")]
    cells = [
        [*(row[name] for name in ("path", "label", "score", *truth)), *(v for e in row["top"][1:] for v in e.values())]
        for row in rows
    ]
    return header, cells
