"""`jaxzs classify IMAGES --labels a,b,c`: a label for each image of a folder, as table, CSV or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import (
    File,
    Folder,
    Images,
    LabelOptions,
    ModelOptions,
    OutputOptions,
    check_numbers,
    check_output_file,
    check_output_folder,
    check_record_beside,
    command_line,
    kept_when_interrupted,
    load_model,
    name_unusable,
    option,
    read_templates,
    say_rows,
    settings_of,
    shown_as,
)
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxzs.classify import Classification
    from jaxzs.clip import Model
    from jaxzs.prompt import TunedPrompt
    from jaxzs.proxy import LearnedProxies
    from jaxzs.report import Results

    Encoder = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyOptions(OutputOptions, ModelOptions, LabelOptions):
    images: Images = ()
    """Folders, files or globs. A folder with one subfolder a class also gives an accuracy."""
    prompt: File = None
    """A prompt that `jaxzs tune` has learned; its class names unless others are given, and no templates."""
    proxies: File = None
    """Proxies that --save has kept, with their class names: nothing is learned, so that one image is enough."""
    method: Annotated[Literal["proxy", "zero-shot"] | None, shown_as("{proxy,zero-shot}")] = None
    """Learn proxies from these images (the default), or compare with the text as it is (the default with --prompt)."""
    templates: Annotated[tuple[str, ...], shown_as("TEXT ...")] = ()
    """Sentences with {}, or sets simple, imagenet7, imagenet80, tagclip85; else the data set's or "a photo of a {}"."""
    gamma: str = "auto"
    """Class balance assumed by proxies: 0 uniform, 1 as predicted by the text, or auto."""
    save: File = None
    """Keep the learned proxies in this .safetensors file, for --proxies."""
    top: int = 1
    """Classes listed for each image."""
    out: File = None
    """Write all results to this .csv or .json file; the record of the run lies beside a .csv file, as .json."""
    store: Folder = None
    """Keep image features in this folder: a run that is stopped goes on, a second one encodes nothing."""
    batch_size: int = 32
    """Images encoded at once."""
    seed: int = 0
    """Of the random halves that gamma auto compares."""


def run(options: ClassifyOptions) -> int:
    """Classify and print; returns 0, or 1 when some images could not be read."""
    _check_options(options)
    import jax.numpy as jnp
    import numpy as np

    from jaxzs import zeroshot
    from jaxzs.classify import check_number_of_classes, classify
    from jaxzs.clip import Numerics
    from jaxzs.data import class_from_subfolder, find_images
    from jaxzs.prompt import load_prompt, prompted_encoders
    from jaxzs.proxy import load_proxies
    from jaxzs.report import Results, measured

    with measured() as seconds:
        paths = find_images(options.images)
        folders = None
        if len(options.images) == 1:
            folders = class_from_subfolder(paths, options.images[0])
        given = options.class_names()
        model = load_model(options)
        tuned = None if options.prompt is None else load_prompt(options.prompt, model)
        kept = None if options.proxies is None else load_proxies(options.proxies, model)
        classes = _classes(options, given, folders, kept or tuned)
        check_number_of_classes(len(classes.names), model.config.projection_dim)
        encode, dtype = None, options.compute_dtype
        if not options.force and kept is None:
            model.check_words(classes.names)
        if kept is not None:
            text = jnp.asarray(kept.proxies)
        elif tuned is None:
            text = zeroshot.text_proxies(
                model, classes.names, classes.templates, numerics=Numerics(dtype), progress=not options.quiet
            )
        else:
            text, encode = prompted_encoders(model, tuned, classes.names, compute_dtype=dtype)
        features, read, unreadable = _encode(options, model, paths, encode)
        result = classify(
            model,
            features,
            text,
            method=_method(options),
            gamma="auto" if options.gamma == "auto" else float(options.gamma),
            top=options.top,
            seed=options.seed,
        )
    rows = _rows(read, classes.names, result)
    say_rows(options, rows, "top", in_file=options.out is not None)
    for note in result.notes:
        options.notice(f"note: {note}")
    results = Results({"images": len(rows), "classes": len(classes.names)})
    if folders is not None:
        places = dict(zip(paths, map(classes.place, folders), strict=True))
        zero_shot = np.asarray(zeroshot.predict(features, text))
        results = _measured(options, classes, result, zero_shot, [places[path] for path in read])
    record = _record(options, model, classes, result, paths, results, seconds)
    record |= {"unreadable": unreadable, "results": rows}
    _write(options, rows, record)
    _save(options, model, classes, result)
    closing = f"{len(rows)} images, {len(classes.names)} classes, method {result.method}"
    if results.figures:
        known, own = results.metrics["known"], results.figures[-1]
        closing += f", accuracy {own.value:.2f} % on {known} images ({own.protocol})"
    if len(results.figures) > 1:
        closing += f", zero-shot {results.figures[0].value:.2f} %"
    options.say(closing)
    options.print_record(record)
    name_unusable(unreadable, len(paths))
    return INCOMPLETE if unreadable else FINISHED


def _check_options(options: ClassifyOptions) -> None:
    if not options.images:
        raise DataError("no images given: name a folder, files or globs")
    if options.prompt is not None and (options.templates or options.store):
        raise DataError("--prompt replaces --templates, and its features are not kept in a --store; leave these out")
    if options.gamma != "auto":
        try:
            valid = 0 <= float(options.gamma) <= 1
        except ValueError:
            valid = False
        if not valid:
            raise DataError(f"--gamma is {options.gamma!r}, expected 0 to 1, or auto")
    check_numbers(options, "batch_size", "top")
    check_output_file(options.out, ".csv", ".json")
    check_record_beside(options.out)
    check_output_folder(options.store, "store")
    check_output_file(options.save, ".safetensors", name="save")
    if options.save is not None and _method(options) != "proxy":
        raise DataError("--save keeps learned proxies, but none are learned here; leave it out")
    if options.proxies is not None:
        names = "prompt", "method", "templates", "labels", "labels_file", "dataset"
        also = [option(name) for name in names if getattr(options, name)]
        if also:
            raise DataError(f"--proxies brings its class names and replaces {', '.join(also)}; leave these out")


def _method(options: ClassifyOptions) -> Literal["proxy", "zero-shot", "learned"]:
    """As asked; else proxies are learned unless there is something better than names: proxies, or a prompt."""
    if options.proxies is not None:
        return "learned"
    return options.method or ("proxy" if options.prompt is None else "zero-shot")


class _Classes(NamedTuple):
    """Class names, templates, and where a subfolder's name stands among the classes (None: nowhere)."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    place: Callable[[str], int | None]


def _classes(
    options: ClassifyOptions,
    given: tuple[str, ...] | None,
    folders: Sequence[str] | None,
    learned: TunedPrompt | LearnedProxies | None,
) -> _Classes:
    """As given, of a known data set, of the tuned prompt or kept proxies, or the names of the subfolders."""
    from jaxzs import zeroshot

    templates = read_templates(options.templates)
    info = options.dataset_info()
    if info is not None:
        return _Classes(info.class_names, templates or info.templates, info.place)
    if given is not None:
        names = given
    elif learned is not None:
        names = learned.class_names
    elif folders is not None:
        names = tuple(dict.fromkeys(folder.replace("_", " ") for folder in folders))
        options.notice(f"class names taken from the subfolders: {', '.join(names)}")
    else:
        raise LabelError("what are the classes? Give --labels a,b,c, --labels-file or --dataset")
    zeroshot.check_class_names(names)
    plain = lambda name: name.replace("_", " ").strip().lower()  # noqa: E731
    places = {plain(name): place for place, name in enumerate(names)}
    return _Classes(names, templates or (zeroshot.DEFAULT_TEMPLATE,), lambda folder: places.get(plain(folder)))


def _encode(
    options: ClassifyOptions, model: Model, paths: Sequence[Path], encode: Encoder | None
) -> tuple[jax.Array, list[Path], list[str]]:
    """Features [N,E] of the images that can be read, their paths, and why the others cannot.

    encode: instead of the model's own encoder. Raises `DataError` when no image can be read.
    """
    if options.store is None:
        features, read, unreadable = encode_files(
            model, paths, options.batch_size, options.compute_dtype, encode, progress=not options.quiet
        )
    else:
        with kept_when_interrupted(
            lambda: f"{options.store} keeps what was encoded, the same command goes on from there"
        ):
            features, read, unreadable = _stored(options, model, paths)
    if not read:
        raise DataError(f"none of the {len(paths)} images could be read; the first: {unreadable[0]}")
    return features, read, unreadable


def _stored(options: ClassifyOptions, model: Model, paths: Sequence[Path]) -> tuple[jax.Array, list[Path], list[str]]:
    """The same through a feature store."""
    import jax.numpy as jnp

    from jaxzs.clip import Numerics
    from jaxzs.data import open_files
    from jaxzs.features import extract

    assert options.store is not None
    store = extract(
        model,
        open_files(paths),
        options.store,
        numerics=Numerics(options.compute_dtype),
        batch_size=options.batch_size,
        max_skipped=len(paths),
        progress=not options.quiet,
    )
    kept = store.arrays()
    return jnp.asarray(kept.features), [paths[i] for i in kept.indices], kept.skipped


def encode_files(
    model: Model,
    paths: Sequence[Path],
    batch_size: int,
    compute_dtype: Any = None,
    encode: Encoder | None = None,
    *,
    progress: bool = True,
) -> tuple[jax.Array, list[Path], list[str]]:
    """Features [N,E] of the readable images, their paths, and why the others cannot be read.

    Reading runs ahead in threads; progress on stderr.
    """
    import jax.numpy as jnp
    from tqdm import tqdm

    from jaxzs.clip import Numerics
    from jaxzs.data import load_images
    from jaxzs.zeroshot import image_features

    unreadable: list[str] = []
    batch_size = min(batch_size, len(paths))
    features = [jnp.zeros((0, model.config.projection_dim), jnp.float32)]
    read: list[Path] = []
    bar = tqdm(total=len(paths), unit="image", disable=None if progress else True)
    batches = load_images(
        paths, model.preprocessor, batch_size=batch_size, on_error=lambda path, error: unreadable.append(str(error))
    )
    for batch in batches:
        features.append(
            image_features(model, batch.pixels, batch_size=batch_size, numerics=Numerics(compute_dtype), encode=encode)
        )
        read.extend(batch.paths)
        bar.update(len(read) + len(unreadable) - bar.n)
    bar.close()
    return jnp.concatenate(features), read, unreadable


def _rows(paths: Sequence[Path], class_names: Sequence[str], result: Classification) -> list[dict[str, Any]]:
    """One record an image: path, label, score, and the best classes with their scores."""
    rows = []
    for path, classes, scores in zip(paths, result.classes, result.scores, strict=True):
        best = [
            {"label": class_names[c], "score": round(float(score), 6)} for c, score in zip(classes, scores, strict=True)
        ]
        rows.append({"path": str(path), **best[0], "top": best})
    return rows


def _measured(
    options: ClassifyOptions,
    classes: _Classes,
    result: Classification,
    zero_shot: np.ndarray,
    places: Sequence[int | None],
) -> Results:
    """Accuracy against the subfolders, over the images whose subfolder is one of the classes (place not None).

    Transductive: with proxies, these are the images that they were learned on (without labels).
    """
    import numpy as np

    from jaxzs.report import Figure, Results, curves

    labels = np.array([-1 if place is None else place for place in places])
    known = labels >= 0
    metrics = {"images": len(labels), "classes": len(classes.names), "known": int(known.sum())}
    if not known.any():
        options.notice("note: no subfolder is named as a class; no accuracy")
        return Results(metrics)
    data, protocol = _data_name(options), "transductive"
    method = "zero-shot" if result.method == "zero-shot" else "proxies"
    if result.method == "learned":
        protocol = "kept proxies"
    if options.prompt is not None:
        method = "tuned prompt" + " and proxies" * (result.method == "proxy")
    found = {method: result.classes[:, 0]}
    # With a prompt or kept proxies there is no plain text to compare with.
    if options.prompt is None and options.proxies is None:
        found = {"zero-shot": zero_shot, **found}
    figures = [
        Figure(data, name, "accuracy", 100 * float((own == labels)[known].mean()), protocol)
        for name, own in found.items()
    ]
    per_class = []
    if len(found) > 1:
        of = data, method, classes.names
        per_class = [curves.per_class(*of, zero_shot, result.classes[:, 0], labels, protocol)]
    return Results(metrics, tuple(figures), tuple(per_class))


def _data_name(options: ClassifyOptions) -> str:
    return options.dataset or Path(options.images[0]).name


def _record(
    options: ClassifyOptions,
    model: Model,
    classes: _Classes,
    result: Classification,
    paths: Sequence[Path],
    results: Results,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The record of the run, not yet written."""
    from jaxzs.data import open_files
    from jaxzs.report import data_entry, write_record

    return write_record(
        None,
        command=command_line("classify", options),
        settings={**settings_of(options), "method": result.method},
        results=results,
        model=model,
        data=data_entry(_data_name(options), open_files(paths).identity, len(paths)),
        seconds=seconds,
        class_names=list(classes.names),
        templates=list(classes.templates),
    )


def _save(options: ClassifyOptions, model: Model, classes: _Classes, result: Classification) -> None:
    """The learned proxies, if they are to be kept; of one image there are none."""
    from jaxzs.proxy import LearnedProxies, save_proxies

    if options.save is None:
        return
    if result.method != "proxy":
        options.notice(f"note: no proxies were learned, {options.save} is not written")
        return
    settings = {"gamma": options.gamma, "images": len(result.classes), "bfloat16": options.bfloat16}
    learned = LearnedProxies(result.proxies, classes.names, model.fingerprint, settings)
    save_proxies(options.save, learned)
    options.say(f"proxies kept in {options.save}")


def _write(options: ClassifyOptions, rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
    """The record as .json, and the table where --out is a .csv file."""
    from jaxzs.files import write_json
    from jaxzs.report import write_csv

    if options.out is None:
        return
    if options.out.suffix.lower() == ".csv":
        depth = len(rows[0]["top"])
        header = ["path", "label", "score"]
        header += [f"{name}_{rank}" for rank in range(2, depth + 1) for name in ("label", "score")]
        cells = [[row["path"], *(entry[name] for entry in row["top"] for name in ("label", "score"))] for row in rows]
        write_csv(options.out, header, cells)
    write_json(options.out.with_suffix(".json"), record)
    options.say(f"{len(rows)} results written to {options.out}")
