"""Images and class names in, labels with scores out: `jaxzs.classify`, on which the command is built.

Zero-shot (Radford et al. 2021, arXiv 2103.00020), or with a head that is fitted to these very images, without labels
or with a few (`jaxzs.adapt`): by default with the method that suits them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import adapt, proxy
from jaxzs.adapt.choice import check_takes_shots
from jaxzs.clip import Model, Numerics, load
from jaxzs.data import Source, batches, from_arrays, from_object, open_image, open_images, order_names
from jaxzs.data.finding import layout_of
from jaxzs.errors import ConfigError, DataError, LabelError
from jaxzs.proxy.settings import Solver
from jaxzs.zeroshot import DEFAULT_TEMPLATE, check_class_names, check_rows, image_features, text_proxies

__all__ = ["Classification", "Encoding", "Labelling", "classify", "classify_features", "encode_source"]

Method = Literal["auto", "proxy", "closed_form", "gda", "stata", "transclip", "zero-shot", "learned"]
FEW_IMAGES_PER_CLASS = 10  # with fewer the user is told to compare with zero-shot
_BLOCK = 4_000_000  # similarities held at once when labels are read off


@dataclasses.dataclass(frozen=True)
class Labelling:
    """How images get their labels.

    Args:
      method: "auto" fits what suits the images (`adapt.choose`); "proxy" learns vision proxies (InMaP); "closed_form",
        "gda", "stata" and "transclip" as in `adapt.fit`; "zero-shot" takes the text proxies as they are; "learned" a
        head that is there already. One image alone is classified zero-shot.
      gamma: class balance that "proxy" assumes: 0 uniform, 1 as the text proxies predict, "auto" chosen without labels
        (a uniform marginal would turn a folder of cats half into dogs).
      solver: of `proxy.Settings`.
      top: classes told for each image.
      seed: of the splits that are compared.
      head: of "learned", from `adapt.load_head`.

    Raises:
      LabelError: `top` below 1.
      ConfigError: a seed that is no whole number below 2**32.

    >>> classification.Labelling("zero-shot", top=5).method
    'zero-shot'
    """

    method: Method = "auto"
    gamma: float | Literal["auto"] = "auto"
    solver: Solver = "fast"
    top: int = 1
    seed: int = 0
    head: adapt.Head | adapt.GaussianHead | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.top, int) or self.top < 1:
            raise LabelError(f"top is {self.top!r}, expected a whole number of at least 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed!r}, expected a whole number from 0 to {2**32 - 1}")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images are encoded: `batch_size` at once, with these numerics, and a bar on terminals if `progress`.

    encode: another encoder of pixels [B,S,S,3] than the model's own, e.g. of `prompt.prompted_encoders`.

    >>> classification.Encoding(numerics=clip.Numerics(jnp.bfloat16)).batch_size
    32
    """

    batch_size: int = 32
    numerics: Numerics = Numerics()
    progress: bool = False
    encode: Callable[[Any], jax.Array] | None = None


# --- images ---------------------------------------------------------------------------------------------------------


def classify(
    images: Any,
    labels: Sequence[str] | None = None,
    model: str | Path | Model = "demo",
    *,
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    labelling: Labelling = Labelling(),
    encoding: Encoding = Encoding(),
    force: bool = False,
) -> list[dict[str, Any]]:
    """The label of each image, as `jaxzs classify` writes it.

    Args:
      images: folders, files and globs (one or several), a uint8 array [N,H,W,3] or [H,W,3], PIL images, arrays and
        files in a list or an iterator, or a `data.Source`.
      labels: C class names; by default the subfolders of one folder that is laid out class/image.
      model: a checkpoint, or what `jaxzs.load` takes.
      templates: sentences with one "{}".
      labelling: method, class balance, and how many classes are told.
      encoding: batch size and numerics.
      force: use class names that the demo checkpoint has never seen.

    Returns:
      A row for each image that can be read: {"path", "label", "score", "top": [{"label", "score"}, ...]}; where any are
      in memory "path" is the place in the list. Of the others a UserWarning tells.

    Raises:
      DataError: no images, or none that can be read.
      LabelError: no class names, one only, two that are one text.
      TextError: words that the demo checkpoint has never seen, a text too long.

    >>> rows = jaxzs.classify("photos", ["zero", "one", "two"])
    >>> len(rows), rows[0]["path"], rows[0]["label"]
    (30, 'photos/one/0.png', 'one')
    """
    for given, kind in ((labelling, Labelling), (encoding, Encoding)):
        if not isinstance(given, kind):
            name = kind.__name__
            raise ConfigError(f"{name.lower()} is {given!r:.60}, expected a jaxzs.classification.{name}(...)")
    loaded = model if isinstance(model, Model) else load(model)
    source = source_of(images)
    # Folders are written with underscores where a sentence has blanks.
    names: Sequence[str] = tuple(name.replace("_", " ") for name in order_names(source.label_names))
    if labels is not None:
        # Also the keys of a dict, or an array, whose texts are NumPy's.
        names = labels if isinstance(labels, str) else tuple(str(n) if isinstance(n, str) else n for n in labels)
    if labels is None and not names:
        hint = split_hint(paths_of(source, range(len(source))))
        raise LabelError(f"what are the classes? Give labels, or a folder with one subfolder a class{hint}")
    check_class_names(names)
    # The demo checkpoint knows few words; what it says of any other is noise.
    if not force:
        loaded.check_words(names)
    text = text_proxies(loaded, names, templates, numerics=encoding.numerics, progress=encoding.progress)
    features, numbers, unreadable = encode_source(loaded, source, encoding)
    if not numbers:
        raise DataError(f"none of the {len(unreadable)} images could be read; the first: {unreadable[0]}")
    if unreadable:
        warnings.warn(f"{len(unreadable)} of {len(source)} images could not be read: {unreadable[0]}", stacklevel=2)
    found = classify_features(loaded, features, text, labelling)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return rows_of(paths_of(source, numbers), names, found, labelling.top)


def source_of(images: Any) -> Source:
    """Images in any form as a source. Raises `DataError`."""
    if isinstance(images, np.ndarray | jax.Array):
        array = np.asarray(images)
        # One image alone, grey or of colours: its rows are no images.
        return from_arrays(array[None] if array.ndim == 2 or array.shape[2:] in ((3,), (4,)) else array)
    if isinstance(images, str | Path):
        return open_images(images)
    if isinstance(images, Source):
        return images
    if isinstance(images, Mapping | bytes | io.IOBase):  # their parts are no images
        raise DataError(f"images are of type {type(images).__name__}, expected paths, PIL images or uint8 arrays")
    listed = list(images) if isinstance(images, Iterable) else [images]
    if all(isinstance(one, str | Path) for one in listed):
        return open_images(listed)
    return from_object(_Mixed(listed), identity=f"{len(listed)} images in memory")


class _Mixed(list[Any]):
    """Images, and paths of images, which are opened when they are asked for."""

    def __getitem__(self, number: Any) -> Any:
        one = super().__getitem__(number)
        return open_image(one) if isinstance(one, str | Path) else one


def split_hint(files: Sequence[str]) -> str:
    """For a message, where files lie as split/class/image: the folder that would say the classes."""
    paths = [Path(file) for file in files]
    if len({path.is_absolute() for path in paths}) != 1:
        return ""
    root = Path(os.path.commonpath([path.parent for path in paths]))
    below = [path.relative_to(root) for path in paths]
    layout = layout_of(below)
    if layout is None or layout.depth != 3:
        return ""
    first = min(path.parts[0] for path in below if len(path.parts) == layout.depth)
    return f"; images lie as split/class/image: name one split, such as {root / first}"


def paths_of(source: Source, numbers: Sequence[int]) -> list[str]:
    """Files as they were found, or numbers of images in memory."""
    files = getattr(source, "files", None)
    return [str(number) if files is None else files[number] for number in numbers]


def encode_source(
    model: Model, source: Source, encoding: Encoding = Encoding()
) -> tuple[jax.Array, list[int], list[str]]:
    """Features [n,E] of the images that can be read, their numbers, and why the others cannot.

    Reading runs ahead in threads.

    >>> features, numbers, unreadable = classification.encode_source(jaxzs.load("demo"), data.open_source("photos"))
    >>> features.shape, len(numbers), unreadable
    ((30, 64), 30, [])
    """
    from tqdm import tqdm

    size = min(encoding.batch_size, max(1, len(source)))
    # So that there is a part to join where nothing could be read.
    features = [jnp.zeros((0, model.config.projection_dim), jnp.float32)]
    read: list[int] = []
    unreadable: list[str] = []
    silent = None if encoding.progress else True
    with tqdm(total=len(source), unit="image", desc="encode images", disable=silent) as bar:
        for batch in batches(source, model.preprocess, size):
            found = image_features(
                model, batch.pixels, batch_size=size, numerics=encoding.numerics, encode=encoding.encode
            )
            features.append(found[jnp.asarray(batch.mask)])  # [n,E], without filling and what could not be read
            read += batch.indices[batch.mask].tolist()
            unreadable += batch.errors
            bar.update(int(batch.mask.sum()) + len(batch.errors))  # an unreadable image is done, too
    return jnp.concatenate(features), read, unreadable  # [n,E]


def rows_of(paths: Sequence[str], names: Sequence[str], found: Classification, top: int = 1) -> list[dict[str, Any]]:
    """A row an image: path, label, score, and the best classes with their scores."""
    rows = []
    for path, classes, scores in zip(paths, found.classes[:, :top], found.scores[:, :top], strict=True):
        best = [{"label": names[c], "score": round(float(s), 6)} for c, s in zip(classes, scores, strict=True)]
        rows.append({"path": path, **best[0], "top": best})
    return rows


# --- features -------------------------------------------------------------------------------------------------------


class Classification(NamedTuple):
    """Labels of N images.

    classes [N,k] int32: most similar first. scores [N,k]: probabilities, 0 to 1, calibrated where a head was fitted.
    head: what gave them. method: the one really used. notes: warnings for the user. chosen: by which method
    and why, where the rule has decided, else empty.
    """

    classes: np.ndarray
    scores: np.ndarray
    head: adapt.Head | adapt.GaussianHead
    method: Method
    notes: tuple[str, ...]
    chosen: str = ""


def classify_features(
    model: Model,
    image_features: jax.Array,
    text_proxies: jax.Array,
    labelling: Labelling = Labelling(),
    shots: adapt.Shots | None = None,
    fitted: np.ndarray | None = None,
) -> Classification:
    """Classify features by text proxies, or by a head that is fitted to the features themselves.

    Args:
      model: the checkpoint that made the features; its logit scale s gives the temperatures 1/s (text) and 4/s
        (vision), the paper's 0.01 and 0.04 at s = 100.
      image_features: [N,E], of all images to classify (heads are fitted to them).
      text_proxies: [C,E], from `zeroshot.text_proxies`.
      labelling: the method and its choices.
      shots: images whose labels are known, for "auto" and "gda".
      fitted: [N] bool, the images that heads of `adapt.fit` are fitted to; by default all. Those that are among the
        shots need not count twice.

    Returns:
      `Classification`, with the best `labelling.top` classes.

    Raises:
      LabelError: fewer than two classes, or more than memory allows.
      DataError: no images, features of another width, rows that are not finite or zero.
      ConfigError: shots for a method that takes none.

    >>> model = jaxzs.load("demo")
    >>> text = zeroshot.text_proxies(model, ["zero", "one"], ["the digit {}"])
    >>> labelling = classification.Labelling("zero-shot")
    >>> classification.classify_features(model, text, text, labelling).classes[:, 0].tolist()
    [0, 1]
    """
    num_images, num_classes = len(image_features), len(text_proxies)
    if num_images == 0:
        raise DataError("there are no images to classify")
    check_number_of_classes(num_classes, text_proxies.shape[1])
    check_rows(image_features, "image")
    check_rows(text_proxies, "proxy")
    check_takes_shots(labelling.method, shots)
    # With labels one image is enough.
    usable = (labelling.method, ()) if shots is not None else _usable_method(labelling.method, num_images, num_classes)
    method, notes = usable
    found = _fitted(model, image_features, text_proxies, dataclasses.replace(labelling, method=method), shots, fitted)
    classes, scores = top_classes(image_features, found, min(labelling.top, num_classes))
    # Features were looked at above, but the temperatures are the checkpoint's own, which may be anything.
    if not np.isfinite(scores).all():
        raise DataError(f"the scores are not finite: the checkpoint's logit scale is {model.logit_scale:.3g}")
    return Classification(classes, scores, found.head, method, notes, _choice_of(found))


def _fitted(
    model: Model,
    features: jax.Array,
    text: jax.Array,
    labelling: Labelling,
    shots: adapt.Shots | None,
    fitted: np.ndarray | None,
) -> adapt.Adapted:
    """The head, and what the rule chose."""
    if labelling.method == "learned":
        if labelling.head is None:
            raise DataError('method "learned" has no head', python="Labelling(head=adapt.load_head(...).head)")
        return adapt.Adapted(labelling.head, None, jnp.float32(1))
    key, temperature = jax.random.key(labelling.seed), 1 / model.logit_scale
    if labelling.method == "proxy":
        settings = proxy.Settings(gamma=labelling.gamma, solver=labelling.solver)
        scale = model.logit_scale
        proxies = proxy.fit(features, text, settings, logit_scale=scale, mask=fitted, key=key).proxies
        # Vision proxies are read at four times the text's temperature: 0.04 beside 0.01 in arXiv 2310.19752.
        return adapt.Adapted(adapt.text_head(proxies, temperature=4 * temperature), None, jnp.float32(1))
    return adapt.fit(
        features, text, method=labelling.method, temperature=temperature, key=key, shots=shots, mask=fitted
    )


def _choice_of(found: adapt.Adapted) -> str:
    return "" if found.choice is None else f"chosen without labels: {found.choice.reason}"


def _usable_method(method: Method, num_images: int, num_classes: int) -> tuple[Method, tuple[str, ...]]:
    """The method that this number of images allows, and what the user should know about it."""
    if method in ("zero-shot", "learned"):
        return method, ()
    if num_images == 1:
        return "zero-shot", ("one image only: heads are fitted to many; classified zero-shot",)
    if method != "proxy":
        return method, ()
    if num_images < num_classes:
        return method, (
            f"{num_images} images for {num_classes} classes: fewer images than classes, learned "
            "proxies may be worse than zero-shot",
        )
    if num_images < FEW_IMAGES_PER_CLASS * num_classes:
        return method, (
            f"{num_images} images for {num_classes} classes: with fewer than about "
            f"{FEW_IMAGES_PER_CLASS} images a class, compare with the method zero-shot",
        )
    return method, ()


def check_number_of_classes(num_classes: int, width: int) -> None:
    """Raise `LabelError` for one class (nothing to tell apart) or more than the host's memory can hold."""
    if num_classes < 2:
        raise LabelError(
            "one class only: every image would be given it. Name at least two, e.g. what the "
            "images could be confused with"
        )
    needed = 12 * 4 * num_classes * width  # the solver's directions, gradients and transports
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise LabelError(
            f"{num_classes:,} classes need about {needed / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f} GiB: at most {memory // (12 * 4 * width):,} classes"
        )


def top_classes(image_features: jax.Array, found: adapt.Adapted, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Best classes and their probabilities, by blocks of images: [N,E] -> ([N,k] int32, [N,k])."""
    rows = max(1, _BLOCK // adapt.num_classes(found.head))  # images whose similarities fit into a block
    blocks = [
        _top_of_block(image_features[start : start + rows], _of_rows(found, slice(start, start + rows)), top)
        for start in range(0, len(image_features), rows)
    ]
    classes, scores = zip(*blocks, strict=True)
    return np.concatenate(classes), np.concatenate(scores)  # [N,k] each


def _of_rows(found: adapt.Adapted, rows: slice) -> adapt.Adapted:
    """The posterior of StatA and TransCLIP is of images: its part for these."""
    head = found.head
    if isinstance(head, adapt.GaussianHead) and head.posterior is not None:
        head = head._replace(posterior=head.posterior[rows])  # [N,C] -> [n,C]
    return found._replace(head=head, choice=None)  # no label depends on it: one program with it and without


@functools.partial(jax.jit, static_argnames="top")
def _top_of_block(image_features, found, top):
    best, classes = jax.lax.top_k(adapt.probabilities(found, image_features), top)  # [n,k] each
    return classes, best
