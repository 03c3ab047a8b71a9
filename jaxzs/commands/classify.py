"""`jaxzs classify IMAGES --labels a,b,c`: a label for each image of a folder, as table, CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxzs.classify import Classification
    from jaxzs.clip import Model
    from jaxzs.prompt import TunedPrompt

    Encoder = Callable[[np.ndarray], jax.Array]

_SHOWN = 20  # lines of results on the terminal when they also go to a file


@dataclasses.dataclass(frozen=True)
class ClassifyOptions:
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folders, files or globs. A folder with one subfolder a class also gives an accuracy."""
    labels: str | None = None
    """Class names, separated by commas."""
    labels_file: Path | None = None
    """File with one class name a line, or a JSON list."""
    dataset: str | None = None
    """Class names and templates of a known data set; `jaxzs datasets` lists them."""
    model: str = "demo"
    """The embedded demo checkpoint, a folder, or a hub id such as openai/clip-vit-base-patch32."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    prompt: Path | None = None
    """A prompt that `jaxzs tune` has learned; its class names unless others are given, and no templates."""
    method: Literal["proxy", "zero-shot"] | None = None
    """Learn proxies from these images (the default), or compare with the text as it is (the default with --prompt)."""
    templates: tuple[str, ...] = ()
    """Sentences with {} for the class name, or sets of them: simple, imagenet7, imagenet80, tagclip85. By default
    those of the data set, or "a photo of a {}."."""
    gamma: str = "auto"
    """Class balance assumed by proxies: 0 uniform, 1 as predicted by the text, or auto."""
    top: int = 1
    """Classes listed for each image."""
    out: Path | None = None
    """Write all results to this .csv or .json file."""
    store: Path | None = None
    """Keep image features in this folder: a run that is stopped goes on, a second one encodes nothing."""
    batch_size: int = 32
    """Images encoded at once."""
    bfloat16: bool = False
    """Encode with bfloat16 products: about twice as fast, features equal to three digits."""
    force: bool = False
    """Use class names that the demo checkpoint has never seen."""
    seed: int = 0
    """Of the random halves that gamma auto compares."""


def run(options: ClassifyOptions) -> int:
    """Classify and print; returns 0, or 1 when some images could not be read."""
    _check_options(options)
    from jaxzs import zeroshot
    from jaxzs.classify import check_number_of_classes, classify
    from jaxzs.clip import load
    from jaxzs.data import class_from_subfolder, find_images
    from jaxzs.prompt import load_prompt, prompted_encoders

    paths = find_images(options.images)
    folders = class_from_subfolder(paths, options.images[0]) if len(options.images) == 1 else None
    model = load(options.model, revision=options.revision)
    tuned = None if options.prompt is None else load_prompt(options.prompt, model)
    classes = _classes(options, folders, tuned)
    check_number_of_classes(len(classes.names), model.config.projection_dim)
    if not options.force:
        model.check_words(classes.names)
    encode = None
    if tuned is None:
        text = zeroshot.text_proxies(
            model, classes.names, classes.templates, compute_dtype=_dtype(options), progress=True
        )
    else:
        text, encode = prompted_encoders(model, tuned, classes.names, compute_dtype=_dtype(options))
    features, read, unreadable = _encode(options, model, paths, encode)
    result = classify(
        model,
        features,
        text,
        method=options.method or ("proxy" if tuned is None else "zero-shot"),
        gamma="auto" if options.gamma == "auto" else float(options.gamma),
        top=options.top,
        seed=options.seed,
    )
    rows = _rows(read, classes.names, result)
    _show(rows, options)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    accuracy = None
    if folders is not None:
        true = dict(zip(paths, map(classes.place, folders), strict=True))
        accuracy = _accuracy(result.classes[:, 0], [true[path] for path in read])
    if options.out is not None:
        summary = {
            "model": options.model,
            "fingerprint": model.fingerprint,
            "method": result.method,
            "class_names": list(classes.names),
            "templates": list(classes.templates),
            "accuracy": accuracy,
            "unreadable": unreadable,
        }
        _write(options.out, rows, summary)
        print(f"{len(rows)} results written to {options.out}")
    print(f"{len(rows)} images, {len(classes.names)} classes, method {result.method}", end="")
    print("" if accuracy is None else f", {accuracy}")
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} files could not be read:", file=sys.stderr)
        for error in unreadable:
            print(f"  {error}", file=sys.stderr)
        return 1
    return 0


def _check_options(options: ClassifyOptions) -> None:
    if not options.images:
        raise DataError("no images given: name a folder, files or globs")
    given = [options.labels, options.labels_file, options.dataset]
    if sum(value is not None for value in given) > 1:
        raise LabelError("give only one of --labels, --labels-file and --dataset")
    if options.prompt is not None and (options.templates or options.store):
        raise DataError("--prompt replaces --templates, and its features are not kept in a --store")
    if options.gamma != "auto":
        try:
            valid = 0 <= float(options.gamma) <= 1
        except ValueError:
            valid = False
        if not valid:
            raise DataError(f"--gamma is {options.gamma!r}, expected 0 to 1, or auto")
    if options.out is not None and options.out.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"--out {options.out}: the name must end in .csv or .json")
    if options.batch_size < 1 or options.top < 1:
        raise DataError("--batch-size and --top must be at least 1")


def _dtype(options: ClassifyOptions) -> Any:
    import jax.numpy as jnp

    return jnp.bfloat16 if options.bfloat16 else None


class _Classes(NamedTuple):
    """Class names, templates, and where a subfolder's name stands among the classes (None: nowhere)."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    place: Callable[[str], int | None]


def _classes(
    options: ClassifyOptions, folders: Sequence[str] | None, tuned: TunedPrompt | None
) -> _Classes:
    """As given, of a known data set, of the tuned prompt, or the names of the subfolders."""
    from jaxzs import data, zeroshot

    templates = tuple(
        text
        for template in options.templates
        for text in (
            data.template_set(template) if template in data.template_set_names() else (template,)
        )
    )
    if options.dataset is not None:
        info = data.dataset_info(options.dataset)
        return _Classes(info.class_names, templates or info.templates, info.place)
    if options.labels is not None:
        names = tuple(name.strip() for name in options.labels.split(","))
    elif options.labels_file is not None:
        names = read_labels(options.labels_file)
    elif tuned is not None:
        names = tuned.class_names
    elif folders is not None:
        names = tuple(dict.fromkeys(folder.replace("_", " ") for folder in folders))
        print(f"class names taken from the subfolders: {', '.join(names)}", file=sys.stderr)
    else:
        raise LabelError("what are the classes? Give --labels a,b,c, --labels-file or --dataset")
    zeroshot.check_class_names(names)
    plain = lambda name: name.replace("_", " ").strip().lower()  # noqa: E731
    places = {plain(name): place for place, name in enumerate(names)}
    return _Classes(
        names, templates or (zeroshot.DEFAULT_TEMPLATE,), lambda folder: places.get(plain(folder))
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, or one a line (blank lines are passed over).

    Raises `LabelError` naming the file when it cannot be read or holds no list of names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"cannot read class names from {path}: {error}") from error
    if path.suffix.lower() != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LabelError(f"{path}: expected a JSON list of class names")
    return tuple(names)


def _encode(
    options: ClassifyOptions, model: Model, paths: Sequence[Path], encode: Encoder | None
) -> tuple[jax.Array, list[Path], list[str]]:
    """Features [N,E] of the images that can be read, their paths, and why the others cannot.

    encode: instead of the model's own encoder. Raises `DataError` when no image can be read.
    """
    if options.store is None:
        features, read, unreadable = encode_files(
            model, paths, options.batch_size, _dtype(options), encode
        )
    else:
        features, read, unreadable = _stored(options, model, paths)
    if not read:
        raise DataError(
            f"none of the {len(paths)} images could be read; the first: {unreadable[0]}"
        )
    return features, read, unreadable


def _stored(
    options: ClassifyOptions, model: Model, paths: Sequence[Path]
) -> tuple[jax.Array, list[Path], list[str]]:
    """The same through a feature store."""
    import jax.numpy as jnp

    from jaxzs.data import open_files
    from jaxzs.features import extract

    assert options.store is not None
    store = extract(
        model,
        open_files(paths),
        options.store,
        compute_dtype=_dtype(options),
        batch_size=options.batch_size,
        max_skipped=len(paths),
        progress=True,
    )
    kept = store.arrays()
    return jnp.asarray(kept.features), [paths[i] for i in kept.indices], kept.skipped


def encode_files(
    model: Model,
    paths: Sequence[Path],
    batch_size: int,
    compute_dtype: Any = None,
    encode: Encoder | None = None,
) -> tuple[jax.Array, list[Path], list[str]]:
    """Features [N,E] of the readable images, their paths, and why the others cannot be read.

    Reading runs ahead in threads; progress on stderr.
    """
    import jax.numpy as jnp
    from tqdm import tqdm

    from jaxzs.data import load_images
    from jaxzs.zeroshot import image_features

    unreadable: list[str] = []
    batch_size = min(batch_size, len(paths))
    features = [jnp.zeros((0, model.config.projection_dim), jnp.float32)]
    read: list[Path] = []
    bar = tqdm(total=len(paths), unit="image", disable=None)
    batches = load_images(
        paths,
        model.preprocessor,
        batch_size=batch_size,
        on_error=lambda path, error: unreadable.append(str(error)),
    )
    for batch in batches:
        features.append(
            image_features(
                model,
                batch.pixels,
                batch_size=batch_size,
                compute_dtype=compute_dtype,
                encode=encode,
            )
        )
        read.extend(batch.paths)
        bar.update(len(read) + len(unreadable) - bar.n)
    bar.close()
    return jnp.concatenate(features), read, unreadable


def _rows(
    paths: Sequence[Path], class_names: Sequence[str], result: Classification
) -> list[dict[str, Any]]:
    """One record an image: path, label, score, and the best classes with their scores."""
    rows = []
    for path, classes, scores in zip(paths, result.classes, result.scores, strict=True):
        best = [
            {"label": class_names[c], "score": round(float(score), 6)}
            for c, score in zip(classes, scores, strict=True)
        ]
        rows.append({"path": str(path), **best[0], "top": best})
    return rows


def _show(rows: Sequence[dict[str, Any]], options: ClassifyOptions) -> None:
    shown = rows if options.out is None else rows[:_SHOWN]
    width = max(len(row["path"]) for row in shown)
    for row in shown:
        best = "  ".join(f"{entry['label']} {entry['score']:.3f}" for entry in row["top"])
        print(f"{row['path']:{width}}  {best}")
    if len(shown) < len(rows):
        print(f"... and {len(rows) - len(shown)} more")


def _accuracy(predicted: np.ndarray, true: Sequence[int | None]) -> str | None:
    """Accuracy against the subfolders, over the images whose subfolder is one of the classes."""
    hits = [
        guess == place for guess, place in zip(predicted, true, strict=True) if place is not None
    ]
    if not hits:
        print("note: no subfolder is named as a class; no accuracy", file=sys.stderr)
        return None
    # Transductive: with proxies, these are the images that the proxies were learned on (without labels).
    return f"accuracy {100 * sum(hits) / len(hits):.2f} % on {len(hits)} images (transductive)"


def _write(path: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    from jaxzs.files import atomic_path, write_json

    if path.suffix.lower() == ".json":
        write_json(path, {**summary, "results": list(rows)})
        return
    depth = len(rows[0]["top"])
    header = ["path", "label", "score"]
    header += [f"{name}_{rank}" for rank in range(2, depth + 1) for name in ("label", "score")]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            best = [value for entry in row["top"] for value in (entry["label"], entry["score"])]
            writer.writerow([row["path"], *best])
