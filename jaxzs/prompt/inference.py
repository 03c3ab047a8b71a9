"""Using tuned prompts: classify with them, and read learned context vectors as words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model, Numerics, normalize
from jaxzs.errors import DataError
from jaxzs.prompt.files import TunedPrompt
from jaxzs.prompt.joint import JointPrompt
from jaxzs.prompt.modality import Prompts
from jaxzs.prompt.prepare import constant_images, freeze
from jaxzs.prompt.training import score


def classify(
    model: Model,
    tuned: TunedPrompt,
    pixels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int = 64,
    compute_dtype: Any = None,
) -> np.ndarray:
    """Logits under a tuned prompt: pixels [N,S,S,3] of `model.preprocess` -> [N,C] float32.

    class_names: other classes than those it was tuned on; a learned context or learned image tokens apply to any.
    Raises `LabelError` and `TextError` for unfit names, `DataError` without images.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> prompt.classify(model, tuned, pixels, class_names=["one", "two", "zero"]).shape
    (1, 3)
    """
    numerics = Numerics(compute_dtype)
    frozen = freeze(
        model, tuned.modality, class_names or tuned.class_names, template=tuned.template, compute_dtype=compute_dtype
    )
    images = constant_images(
        tuned.modality, frozen.params, pixels, model.config, batch_size=batch_size, numerics=numerics
    )
    one_run = jax.tree.map(lambda x: jnp.asarray(x)[None], tuned.prompts)
    return score(tuned.modality, one_run, frozen, images, model.config, batch_size=batch_size, numerics=numerics)[0]


class PromptedEncoders(NamedTuple):
    """What a tuned prompt makes of the two towers.

    text_proxies [C,E] float32, L2-normalised. encode_image: pixels [B,S,S,3] -> [B,E] float32, not normalised, compiled
    once per shape.
    """

    text_proxies: jax.Array
    encode_image: Callable[[np.ndarray], jax.Array]


def prompted_encoders(
    model: Model, tuned: TunedPrompt, class_names: Sequence[str] | None = None, *, compute_dtype: Any = None
) -> PromptedEncoders:
    """Text proxies and image encoder under a tuned prompt, to be used like those of the bare model.

    So proxies can be learned on top of a tuned prompt. class_names: as in `classify`, with its errors.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> encoders = prompt.prompted_encoders(model, tuned)
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> zeroshot.similarity(encoders.encode_image(pixels), encoders.text_proxies).shape
    (1, 2)
    """
    numerics, modality = Numerics(compute_dtype), tuned.modality
    names = class_names or tuned.class_names
    frozen = freeze(model, modality, names, template=tuned.template, compute_dtype=compute_dtype)
    prompts = jax.tree.map(jnp.asarray, tuned.prompts)

    @jax.jit
    def encode_image(pixels: jax.Array) -> jax.Array:
        images = modality.constant_images(frozen.params, pixels, model.config, numerics)
        return modality.image_features(prompts, frozen, images, model.config, numerics)

    text = jax.jit(modality.class_features, static_argnums=(2, 3))(prompts, frozen, model.config, numerics)
    return PromptedEncoders(normalize(text), encode_image)


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
    prefix = np.asarray(text_prefix(tuned))
    table = np.asarray(model.params["text_model"]["embeddings"]["token_embedding"]["embedding"], np.float32)
    distances = np.stack([np.linalg.norm(table - vector[None], axis=1) for vector in prefix])  # [K,V]
    nearest = np.argsort(distances, axis=1)[:, :count]
    words = model.tokenizer.backend.id_to_token
    return [
        [NearToken(str(words(int(v))), float(row[v])) for v in chosen]
        for row, chosen in zip(distances, nearest, strict=True)
    ]


def text_prefix(tuned: TunedPrompt) -> Prompts:
    """The learned context [K,D_text] of a textual or joint prompt."""
    if isinstance(tuned.modality, JointPrompt):
        return tuned.modality.prefixes(jax.tree.map(jnp.asarray, tuned.prompts))[0]
    if tuned.modality.name != "text":
        raise DataError("a visual prompt has no context vectors to read as words")
    return tuned.prompts["prefix"]
