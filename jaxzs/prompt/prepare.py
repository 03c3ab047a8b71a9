"""From a model, class names and images to what training reads: token ids, constant features, device-resident images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model, Numerics, encode_text
from jaxzs.clip.naflex import Pixels
from jaxzs.data import Source, batches
from jaxzs.errors import ConfigError, DataError, LabelError, renamed
from jaxzs.prompt.modality import Frozen, Modality
from jaxzs.prompt.text import placeholder_ids
from jaxzs.zeroshot import check_class_names, check_proxies

TEMPLATE = "a photo of a {}"  # of every published data set, without a full stop


class Pool(NamedTuple):
    """Images as a modality takes them, and their labels.

    images: [N,...] on device, of `constant_images`. labels: [N] int64, -1 where they are not known; None if none is.

    >>> images, labels = prompt.Pool(jnp.zeros((3, 64)), np.array([0, 1, -1]))
    >>> images.shape, labels.tolist()
    ((3, 64), [0, 1, -1])
    """

    images: jax.Array
    labels: Any = None


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
def freeze(
    model: Model,
    modality: Modality,
    class_names: Sequence[str],
    *,
    template: str = TEMPLATE,
    literal_braces: bool = True,
    distinct: bool = True,
    numerics: Numerics = Numerics(),
) -> Frozen:
    """All that training reads of a model and its classes.

    Args:
      model: a loaded checkpoint.
      modality: its prompt length decides the token layout.
      class_names: C names; underscores become blanks.
      template: for the class features without a textual prompt.
      literal_braces: make the first pseudolabels with the template as it stands, braces and all, followed by the
        name ("a photo of a {}river"): the released code forgets to fill it in there. False fills it in.
      distinct: whether a name that occurs twice is an error. Not in a data set whose labels tell the classes apart.
      numerics: type and precision of the text tower's products.

    Raises:
      LabelError: empty or repeated names, names that are one text for the checkpoint, a template without "{}".
      TextError: a name too long for the context.

    >>> model = jaxzs.load("demo")
    >>> frozen = prompt.freeze(model, prompt.TextPrompt(length=4), ["circle", "square"])
    >>> frozen.input_ids.shape, frozen.text_features.shape
    ((2, 7), (2, 64))
    """
    names = [str(name).replace("_", " ") for name in class_names]
    check_class_names(names, distinct=distinct)
    if template.count("{}") != 1:
        raise LabelError(f"template {template!r} must contain '{{}}' exactly once")
    bare, _ = model.tokenize(names)
    encode = functools.partial(_encode_texts, model, numerics)
    text = encode([template.replace("{}", name) for name in names])
    check_proxies(text, names)
    # As released: the template goes unfilled before the name, "a photo of a {}river"; its braces are one token more.
    first = encode([template + name for name in names]) if literal_braces else text
    ids = jnp.asarray(placeholder_ids(bare, modality.length, model.config.text))  # [C,1+K+M+1]
    return Frozen(jax.tree.map(jnp.asarray, model.params), ids, text, first)


def _encode_texts(model: Model, numerics: Numerics, texts: list[str]) -> jax.Array:
    ids, _ = model.tokenize(texts)  # padded to the longest; the mask is causal, padding is never read
    return encode_text(model.params, jnp.asarray(ids), model.config, numerics=numerics)


def read_source(
    model: Model,
    modality: Modality,
    source: Source,
    *,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
    progress: bool = False,
) -> Pool:
    """What of a source's images no prompt changes, and their labels: (images [N,...] on device, labels [N] int64).

    Labels are -1 where the source has none. progress: shown on terminals. Raises `DataError` for an image that
    cannot be read (rows must stay those of the source), for several labels on one image, and for an empty source.

    >>> model, source = jaxzs.load("demo"), data.open_source("photos")
    >>> images, labels = prompt.read_source(model, prompt.TextPrompt(), source)
    >>> images.shape, labels[:3].tolist()
    ((30, 64), [0, 0, 0])
    >>> images, _ = prompt.read_source(model, prompt.VisualPrompt(), source)
    >>> images.shape  # embedded patches: these a visual prompt does not change
    (30, 37, 96)
    """
    from tqdm import tqdm

    kept, labels = [], []
    bar = tqdm(total=len(source), unit="image", desc="read images", disable=None if progress else True)
    for batch in batches(source, model.preprocess, batch_size):
        bar.update(int(np.sum(batch.mask)))
        # Splits name images by their rows: one that is left out would shift all rows behind it.
        if batch.errors:
            raise DataError(f"prompt tuning needs every image: {batch.errors[0]}")
        kept.append(_constants(modality, model.params, batch.pixels, model.config, numerics)[batch.mask])
        own = [places for places, real in zip(batch.labels, batch.mask, strict=True) if real]
        if any(len(places) > 1 for places in own):
            raise LabelError("an image has several labels; prompt tuning classifies into one class")
        labels += [places[0] if places else -1 for places in own]  # -1: not known
    bar.close()
    if not kept:
        raise DataError("there are no images to tune prompts on")
    return Pool(jnp.concatenate(kept), np.array(labels, np.int64))  # [N,...], [N]


def constant_images(
    modality: Modality,
    params: Any,
    pixels: Pixels,
    config: Any,
    *,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """What of the images no prompt changes, batch by batch: pixels [N,S,S,3] -> [N,...] on device.

    Features [N,E] for a textual prompt, embedded patches [N,1+P,D] for the others. Raises `DataError` without images.

    >>> model = jaxzs.load("demo")
    >>> pixels = np.zeros((5, 48, 48, 3), np.float32)
    >>> prompt.constant_images(prompt.TextPrompt(), model.params, pixels, model.config).shape
    (5, 64)
    """
    if len(pixels) == 0:
        raise DataError("there are no images to tune prompts on")
    parts = [
        _constants(modality, params, pixels[rows], config, numerics)[:real]  # [B,...]
        for rows, real in equal_batches(len(pixels), batch_size)
    ]
    return jnp.concatenate(parts)  # [N,...]


def equal_batches(number: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows 0 to N-1 in batches of one size, so that one program serves all: (rows [B], how many of them are real).

    The last row fills up the last batch.
    """
    if not batch_size >= 1:
        raise ConfigError(f"batch_size is {batch_size}, expected 1 or more")
    size = min(batch_size, number)
    for first in range(0, number, size):
        # Behind the end the last row is repeated; whoever asks cuts to the real ones.
        yield np.minimum(np.arange(first, first + size), number - 1), min(size, number - first)


@functools.partial(jax.jit, static_argnames=("modality", "config", "numerics"))
def _constants(modality, params, pixels, config, numerics):
    return modality.constant_images(params, pixels, config, numerics)
