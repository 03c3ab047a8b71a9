"""Using tuned prompts: classify with them, and read learned context vectors as words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model, Numerics, logits_per_image, normalize
from jaxzs.clip.naflex import Pixels
from jaxzs.errors import DataError, renamed
from jaxzs.prompt.files import TunedPrompt
from jaxzs.prompt.joint import JointPrompt
from jaxzs.prompt.modality import Prompts, Task
from jaxzs.prompt.prepare import equal_batches, freeze
from jaxzs.zeroshot import check_proxies


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
def image_logits(
    model: Model,
    tuned: TunedPrompt,
    pixels: Pixels,
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
) -> np.ndarray:
    """Logits under a tuned prompt: pixels [N,S,S,3] of `model.preprocess` -> [N,C] float32.

    class_names: other classes than those it was tuned on; a learned context or learned image tokens apply to any.
    numerics: type and precision of the towers' products.
    Raises `LabelError` and `TextError` for unfit names, `DataError` without images, and where the prompt makes of the
    classes or images what cannot be told apart.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> prompt.image_logits(model, tuned, pixels, class_names=["one", "two", "zero"]).shape
    (1, 3)
    """
    encoders = prompted_encoders(model, tuned, class_names, numerics=numerics)
    if len(pixels) == 0:
        raise DataError("there are no images to classify")
    parts = [
        logits_per_image(  # [B,C]; rows that only fill the batch are cut off
            encoders.encode_image(pixels[rows])[:real], encoders.text_proxies, jnp.asarray(model.params["logit_scale"])
        )
        for rows, real in equal_batches(len(pixels), batch_size)
    ]
    logits = np.concatenate([np.asarray(part) for part in parts])  # [N,C]
    if not np.isfinite(logits).all():
        raise DataError(
            "logits under this prompt are not finite: the prompt has diverged, or the checkpoint is damaged"
        )
    return logits


class PromptedEncoders(NamedTuple):
    """What a tuned prompt makes of the two towers.

    text_proxies [C,E] float32, L2-normalised. encode_image: pixels [B,S,S,3] -> [B,E] float32, not normalised, compiled
    once per shape.
    """

    text_proxies: jax.Array
    encode_image: Callable[[Any], jax.Array]


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
def prompted_encoders(
    model: Model, tuned: TunedPrompt, class_names: Sequence[str] | None = None, *, numerics: Numerics = Numerics()
) -> PromptedEncoders:
    """Text proxies and image encoder under a tuned prompt, to be used like those of the bare model.

    So proxies can be learned on top of a tuned prompt. class_names, errors: as in `image_logits`.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> encoders = prompt.prompted_encoders(model, tuned)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> zeroshot.similarity(encoders.encode_image(pixels), encoders.text_proxies).shape
    (1, 2)
    """
    task = Task(tuned.modality, model.config, numerics)
    # A learned context is shared by all classes: it goes before other names, too.
    names = class_names or tuned.class_names
    frozen = freeze(model, tuned.modality, names, template=tuned.template, numerics=numerics)
    prompts = jax.tree.map(jnp.asarray, tuned.prompts)
    proxies = _class_features(task, prompts, frozen)  # [C,E]
    check_proxies(proxies, names)
    # Weights are arguments of the program: as constants they would be compiled into it, once more in memory.
    return PromptedEncoders(normalize(proxies), functools.partial(_encode_image, task, prompts, frozen))


@jax.jit
def _encode_image(task, prompts, frozen, pixels):
    images = task.modality.constant_images(frozen.params, pixels, task.config, task.numerics)  # [B,E] or [B,1+P,D]
    return task.modality.image_features(prompts, frozen, images, task.config, task.numerics)  # [B,E]


@jax.jit
def _class_features(task, prompts, frozen):
    return task.modality.class_features(prompts, frozen, task.config, task.numerics)  # [C,E]


class NearToken(NamedTuple):
    """A token of the vocabulary and its Euclidean distance from a learned vector."""

    text: str
    distance: float


def nearest_tokens(model: Model, tuned: TunedPrompt, count: int = 3) -> list[list[NearToken]]:
    """The nearest tokens of every learned context vector, nearest first (as CoOp reads its contexts, table 4).

    A vector may lie far from all words; compare the distances with those between words. Raises `DataError` for a
    visual prompt, which has no words.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> nearest = prompt.nearest_tokens(model, tuned)
    >>> len(nearest), len(nearest[0]), nearest[0][0].distance <= nearest[0][1].distance
    (4, 3, True)
    """
    prefix = np.asarray(text_prefix(tuned))  # [K,D]
    table = np.asarray(model.params["text_model"]["embeddings"]["token_embedding"]["embedding"], np.float32)  # [V,D]
    # One vector at a time: all differences at once would be K times the table.
    distances = np.stack([np.linalg.norm(table - vector[None], axis=1) for vector in prefix])  # [K,V]
    nearest = np.argsort(distances, axis=1)[:, :count]  # [K,count]
    words = model.tokenizer.backend.id_to_token
    return [
        [NearToken(str(words(int(v))), float(row[v])) for v in chosen]
        for row, chosen in zip(distances, nearest, strict=True)
    ]


def text_prefix(tuned: TunedPrompt) -> Prompts:
    """The learned context [K,D_text] of a textual or joint prompt."""
    if isinstance(tuned.modality, JointPrompt):
        # What the text tower reads are the mixed vectors, not the tokens that are stored.
        return tuned.modality.prefixes(jax.tree.map(jnp.asarray, tuned.prompts))[0]
    if tuned.modality.name != "text":
        raise DataError("a visual prompt has no context vectors to read as words")
    return tuned.prompts["prefix"]
