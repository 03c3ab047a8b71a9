"""Zero-shot classification with CLIP: text proxies from class names and templates, prediction by cosine.

Radford et al. 2021, arXiv 2103.00020, section 3.1; the averaging over templates is that of its section 3.1.4,
as InMaP (arXiv 2310.19752) uses it.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model, Numerics, encode_image, encode_text, normalize
from jaxzs.clip.model import end_positions
from jaxzs.clip.naflex import Pixels
from jaxzs.errors import DataError, LabelError, renamed

_RENAMED = {"compute_dtype": "numerics=clip.Numerics(compute_dtype)"}
DEFAULT_TEMPLATE = "a photo of a {}."
_SAME = 2e-8  # entries of unit rows: half a unit in the last place, for equal rows in other batches
_SHORTEST = 1e-18  # whose square is still a normal float32


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class name: C*M texts, the templates of a class together.

    Raises `LabelError` for no or empty names, and for templates without exactly one "{}".

    >>> zeroshot.fill_templates(["cat"], ["a photo of a {}.", "art of the {}."])
    ['a photo of a cat.', 'art of the cat.']
    """
    check_class_names(class_names, distinct=False)
    if isinstance(templates, str) or not templates:
        raise LabelError("templates must be a non-empty list of texts such as 'a photo of a {}.'")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise LabelError(f"template {template!r} must contain '{{}}' exactly once: the class name goes there")
    return [template.replace("{}", name) for name in class_names for template in templates]


def check_class_names(class_names: Sequence[str], *, distinct: bool = True) -> None:
    """Raise `LabelError` unless `class_names` are non-empty texts, and distinct (ImageNet's are not).

    distinct: whether a name that occurs twice is an error too.

    >>> zeroshot.check_class_names(["cat", "dog", "cat"])
    Traceback (most recent call last):
    jaxzs.errors.LabelError: class names occur more than once: cat
    """
    if isinstance(class_names, str) or len(class_names) == 0:
        given = f", not the text {class_names!r:.60}" if isinstance(class_names, str) else ""
        raise LabelError(f"class names must be a non-empty list of texts{given}")
    for position, name in enumerate(class_names):
        if not isinstance(name, str):
            raise LabelError(f"class name number {position} is no text, but {name!r:.60}")
        if not name.strip():
            raise LabelError(f"class name number {position} is empty ({name!r})")
    occurrences = collections.Counter(name.strip() for name in class_names)
    repeated = sorted(name for name, count in occurrences.items() if count > 1)
    if distinct and repeated:
        raise LabelError(f"class names occur more than once: {', '.join(repeated)}")


@renamed(**_RENAMED)
def text_features(
    model: Model, texts: Sequence[str], *, batch_size: int = 256, numerics: Numerics = Numerics()
) -> jax.Array:
    """Encode texts: list of N -> [N,E] float32, L2-normalised.

    The texts are cut behind the longest end token of their batch: the text tower is causal, so nothing changes, and
    short prompts cost a third of the padded length. Lengths are rounded up to 8, so that few are compiled.
    Raises `TextError` for an empty text or one too long for the model's context, `DataError` for features that are
    not finite.

    >>> zeroshot.text_features(jaxzs.load("demo"), ["the digit one", "the digit two"]).shape
    (2, 64)
    """
    features = []
    for start in range(0, len(texts), batch_size):
        # Right padding never changes a feature, so no attention mask is needed.
        input_ids, _ = model.tokenizer(
            texts[start : start + batch_size], pad_to=model.config.text.max_position_embeddings
        )
        input_ids = input_ids[:, : _longest(input_ids, model)]  # [B,T]
        count = len(input_ids)
        input_ids = _fill_up(input_ids, min(batch_size, len(texts)))
        encoded = encode_text(model.params, input_ids, model.config, numerics=numerics)
        features.append(encoded[:count])  # [B,E], without the rows that fill up
    encoded = jnp.concatenate(features)
    check_rows(encoded, "text")
    return normalize(encoded)


def _longest(input_ids: np.ndarray, model: Model) -> int:
    """Length of the longest text with its end token, rounded up to a multiple of 8."""
    end = int(end_positions(input_ids, model.config.text).max())
    return min(8 * math.ceil((end + 1) / 8), input_ids.shape[1])


def _fill_up(rows: Any, size: int) -> Any:
    """A batch of `size` rows whatever `rows` has, so that one program serves all: filled with the first row."""
    filling = size - len(rows)
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[:1], filling, axis=0)]), rows)


@renamed(**_RENAMED)
def text_proxies(
    model: Model,
    class_names: Sequence[str],
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    *,
    batch_size: int = 256,
    numerics: Numerics = Numerics(),
    progress: bool = False,
) -> jax.Array:
    """One text proxy a class: [C,E] float32, L2-normalised.

    Each template is filled, encoded and L2-normalised; the mean over templates is L2-normalised again.

    Args:
      model: a loaded checkpoint.
      class_names: C names.
      templates: M texts with one "{}" each.
      batch_size: texts per encoder call, rounded down to whole classes.
      numerics: type of the operands of matrix products (float32 by default) and their XLA precision.
      progress: show a progress bar over classes on stderr, when that is a terminal.

    Raises:
      LabelError: no or empty names, a template without "{}", two names that the checkpoint cannot tell apart.
      TextError: a text too long for the model's context.
      DataError: features that are not finite.

    >>> model = jaxzs.load("demo")
    >>> zeroshot.text_proxies(model, ["zero", "one"], ["the digit {}.", "a photo of the digit {}."]).shape
    (2, 64)
    """
    from tqdm import tqdm

    texts, per_class = fill_templates(class_names, templates), len(templates)
    _check_ids(model, class_names, texts[::per_class])
    # Whole classes to a batch: the mean over templates then stays inside of one.
    step = per_class * min(max(1, batch_size // per_class), len(class_names))
    proxies = []
    bar = tqdm(total=len(class_names), unit="class", desc="encode texts", disable=None if progress else True)
    for start in range(0, len(texts), step):
        batch = texts[start : start + step]
        # The last batch is filled up with its first text; the means of that are cut off below.
        features = text_features(model, batch + batch[:1] * (step - len(batch)), batch_size=step, numerics=numerics)
        means = features.reshape(step // per_class, per_class, -1).mean(axis=1)  # [C,M,E] -> [C,E]
        proxies.append(normalize(means)[: len(batch) // per_class])
        bar.update(len(batch) // per_class)
    bar.close()
    found = jnp.concatenate(proxies)  # [C,E]
    check_proxies(found, class_names)
    return found


def _check_ids(model: Model, class_names: Sequence[str], texts: Sequence[str]) -> None:
    """Raise `LabelError` for different names with the same tokens, before anything is encoded."""
    input_ids, _ = model.tokenizer(texts, pad_to=model.config.text.max_position_embeddings)
    named: dict[bytes, str] = {}
    for name, row in zip(class_names, input_ids, strict=True):
        if named.setdefault(row.tobytes(), name) != name:  # equal names are the caller's own wish
            raise LabelError(
                f"class names {named[row.tobytes()]!r} and {name!r} are one text for this checkpoint, the same tokens: "
                "its images could not be told apart; rename one, or leave it out"
            )


def check_proxies(proxies: jax.Array, class_names: Sequence[str] | None = None) -> None:
    """Raise unless the rows of [C,E] can decide between classes: finite, of usable length, no two of them equal.

    class_names: named in messages; a name that occurs twice, as in ImageNet's published list, may have equal rows.
    Raises `DataError` for rows that are no directions, `LabelError` for equal ones.

    >>> zeroshot.check_proxies(jnp.array([[1.0, 0.0], [0.0, 0.0]]), ["cat", "dog"])
    Traceback (most recent call last):
    jaxzs.errors.DataError: the proxy of class 'dog' has length 0: no image can be compared with it
    """
    names = list(class_names or map(str, range(len(proxies))))
    check_rows(proxies, "proxy", [f"class {name!r}" for name in names])
    rows = np.asarray(normalize(proxies))  # [C,E]
    # Along a random direction, equal rows are neighbours; every pair need not be looked at.
    order = np.argsort(rows @ np.random.default_rng(0).standard_normal(rows.shape[1]), kind="stable")
    apart = np.abs(rows[order[1:]] - rows[order[:-1]]).max(axis=1, initial=0)  # [C-1]
    for place in np.flatnonzero(apart <= _SAME):
        one, other = sorted(order[place : place + 2])
        if names[one] != names[other]:
            raise LabelError(
                f"classes {names[one]!r} and {names[other]!r} have the same proxy: images could not be told apart. If "
                "all classes have, the checkpoint's end token is not its tokenizer's, or its weights are unfit"
            )


def check_rows(rows: jax.Array, what: str, names: Sequence[str] = ()) -> None:
    """Raise `DataError` naming the first row of [N,E] that is not finite, or that has no length to divide by.

    >>> zeroshot.check_rows(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), "image")
    Traceback (most recent call last):
    jaxzs.errors.DataError: the features of image 1 are not finite (1 of 2 rows): weights or preprocessing are unfit
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(np.asarray(rows, np.float32), axis=-1)  # in the arithmetic that divides by them
    unfit = np.flatnonzero(~np.isfinite(lengths) | (lengths < _SHORTEST))
    if not len(unfit):
        return
    first = int(unfit[0])
    name = f"the {what} of {names[first]}" if names else f"the features of {what} {first}"
    if np.isfinite(lengths[first]):  # then it is too short
        raise DataError(f"{name} has length {lengths[first]:.3g}: no image can be compared with it")
    verb = "is" if names else "are"
    raise DataError(
        f"{name} {verb} not finite ({len(unfit)} of {len(lengths)} rows): weights or preprocessing are unfit"
    )


@renamed(**_RENAMED)
def image_features(
    model: Model,
    pixels: Pixels,
    *,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
    encode: Callable[[Any], jax.Array] | None = None,
) -> jax.Array:
    """Encode preprocessed images in batches of one shape: pixels [N,S,S,3] -> [N,E] float32, L2-normalised.

    pixels: of `model.preprocess`; NaFlex: `clip.Patches` of N images.
    encode: another encoder of pixels than the model's own, e.g. `prompt.prompted_encoders(...).encode_image`.
    Raises `DataError` for an empty set, and for features that are not finite.

    >>> model, source = jaxzs.load("demo"), data.open_source("photos")
    >>> pixels = model.preprocess([source[number].image for number in range(len(source))])
    >>> zeroshot.image_features(model, pixels).shape
    (30, 64)
    """
    if len(pixels) == 0:
        raise DataError("there are no images to encode")
    encode = encode or functools.partial(encode_image, model.params, config=model.config, numerics=numerics)
    batch_size = min(batch_size, len(pixels))  # a few images are not filled up to a full batch
    features = []
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        filled = _fill_up(batch, batch_size)
        features.append(encode(filled)[: len(batch)])  # [B,E], without the rows that fill up
    encoded = jnp.concatenate(features)
    check_rows(encoded, "image")
    return normalize(encoded)


def similarity(image_features: jax.Array, proxies: jax.Array) -> jax.Array:
    """Cosine between images and class proxies: [N,E], [C,E] -> [N,C] float32. Both are L2-normalised here.

    Raises `DataError` for shapes that do not fit.

    >>> zeroshot.similarity(jnp.eye(2), 3 * jnp.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if image_features.ndim != 2 or proxies.ndim != 2 or image_features.shape[1] != proxies.shape[1]:
        raise DataError(
            f"image features {tuple(image_features.shape)} and proxies {tuple(proxies.shape)} must "
            "be [N,E] and [C,E] of one E: were they made by the same checkpoint?"
        )
    # Full precision: accelerators round operands by default, and classes that are nearly equal would change places.
    return jnp.matmul(normalize(image_features), normalize(proxies).T, precision=jax.lax.Precision.HIGHEST)  # [N,C]


def predict(image_features: jax.Array, proxies: jax.Array) -> jax.Array:
    """Most similar class of each image: [N,E], [C,E] -> [N] int32.

    Arguments and errors as `similarity`; the first of equals wins.

    >>> model, source = jaxzs.load("demo"), data.open_source("photos")
    >>> items = [source[number] for number in range(len(source))]
    >>> images = zeroshot.image_features(model, model.preprocess([item.image for item in items]))
    >>> text = zeroshot.text_proxies(model, source.label_names, ["the digit {}."])
    >>> labels = jnp.array([item.labels[0] for item in items])
    >>> round(float(metrics.accuracy(zeroshot.predict(images, text), labels)), 2)
    0.83
    """
    return similarity(image_features, proxies).argmax(-1).astype(jnp.int32)
