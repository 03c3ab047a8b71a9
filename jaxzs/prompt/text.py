"""Textual prompt: one learned context before every class name (CoOp, arXiv 2109.01134, shared by all classes).

Layout of a class: [start] [prefix]*K [name ...] [end], then padding that nothing reads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig, TextConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.clip.model import _check_ids, encode_image, end_positions, read_text
from jaxzs.clip.naflex import Pixels
from jaxzs.errors import TextError, renamed
from jaxzs.prompt.modality import Frozen, Prompts, check_prefix, check_settings
from jaxzs.prompt.towers import read_text_with_context


def placeholder_ids(input_ids: Any, length: int, text: TextConfig) -> np.ndarray:
    """Token ids of class names with `length` places for a prefix behind the start token, cut to the longest.

    input_ids [C,T] integer: the bare names as the checkpoint's tokenizer gives them (start, name, end, padding).
    Returns [C,1+K+M+1] int32, M the tokens of the longest name; of a tower that reads in both directions (SigLIP)
    [C,T], the places in front and as much less padding behind. Built from ids: a small vocabulary may have no word
    to stand for a place. The places repeat the start token, which is never taken for an end.

    Raises `TextError` if a name with its prefix is longer than the checkpoint's context.

    >>> text = clip.TextConfig(vocab_size=512, eos_token_id=511, max_position_embeddings=8)
    >>> prompt.placeholder_ids(np.array([[510, 7, 511, 0], [510, 8, 9, 511]]), 2, text)
    array([[510, 510, 510,   7, 511,   0],
           [510, 510, 510,   8,   9, 511]], dtype=int32)
    """
    ids = np.asarray(input_ids)
    if not len(ids) or isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 0:
        raise TextError(f"{len(ids)} texts and {length!r} places: expected texts, and a whole number of places")
    # The tower's length is checked below, with the prefix: here any length will do.
    _check_ids(ids, dataclasses.replace(text, max_position_embeddings=ids.shape[-1]), None)
    if not text.causal:
        return _in_front(ids, int(length))
    ends = np.asarray(end_positions(jnp.asarray(ids, jnp.int32), text))  # [C]
    longest = int(ends.max()) + length + 1  # tokens with start, prefix and end
    if longest > text.max_position_embeddings:
        row = int(ends.argmax())
        raise TextError(
            f"the name of class {row} has {int(ends[row]) - 1} tokens; with a prompt of {length}, a start "
            f"and an end token that is {longest}, and this checkpoint takes "
            f"{text.max_position_embeddings}. Shorten the name or the prompt."
        )
    places = np.repeat(ids[:, :1], length, axis=1)  # [C,K]: only places, their embeddings are overwritten
    # Cut behind the longest end token: the mask is causal, so nothing that is read sees the padding.
    return np.concatenate([ids[:, :1], places, ids[:, 1 : ends.max() + 1]], axis=1).astype(np.int32)  # [C,1+K+M+1]


def _in_front(ids: np.ndarray, length: int) -> np.ndarray:
    # Padding is read, at its place: a text keeps its length, and of what repeats its last token one stays, the end.
    padding = np.cumprod((ids == ids[:, -1:])[:, ::-1], axis=1).sum(1)  # [C]
    if padding.min() <= length:
        row = int(padding.argmin())
        raise TextError(
            f"the name of class {row} leaves room for {int(padding[row]) - 1} of {ids.shape[1]} tokens, and the prompt "
            f"has {length}. Shorten the name or the prompt."
        )
    places = np.repeat(ids[:, :1], length, axis=1)  # [C,K]: only places, their embeddings are overwritten
    return np.concatenate([places, ids[:, : ids.shape[1] - length]], axis=1).astype(np.int32)  # [C,T]


def embed_with_prefix(
    params: Params, prefix: jax.Array, input_ids: jax.Array, half: bool = False, start: int = 1
) -> jax.Array:
    """Embeddings with K positions overwritten: prefix [K,D], input_ids [C,T] -> [C,T,D] float32.

    start: how many tokens stand before the prefix, the start token or none.
    half: round embeddings and positions to float16 before they are added, as the authors' code does (their
    text tower takes float16 inputs even on CPU); the gradient is rounded likewise.
    """
    tree = params["text_model"]["embeddings"]
    tokens = tree["token_embedding"]["embedding"].astype(jnp.float32)[input_ids]  # [C,T,D]
    C, K = input_ids.shape[0], prefix.shape[0]
    prefix = jnp.broadcast_to(prefix[None], (C, *prefix.shape))  # [C,K,D], the same for every class
    tokens = jnp.concatenate([tokens[:, :start], prefix, tokens[:, start + K :]], axis=1)  # [C,T,D]
    positions = tree["position_embedding"]["embedding"].astype(jnp.float32)
    positions = positions[None, : input_ids.shape[1]]  # [1,T,D]; the prefix gets its positions, too
    if half:
        # As released: both are rounded before they are added, also on a CPU.
        return (tokens.astype(jnp.float16) + positions.astype(jnp.float16)).astype(jnp.float32)
    return tokens + positions


@renamed(
    compute_dtype="numerics=clip.Numerics(compute_dtype)",
    precision="numerics=clip.Numerics(precision=...)",
    share_context="modality=prompt.TextPrompt(share_context=...)",
    half="modality=prompt.TextPrompt(half=...)",
    recompute="modality=prompt.TextPrompt(recompute=...)",
)
def text_features(
    params: Params,
    prefix: jax.Array,
    input_ids: jax.Array,
    config: CLIPConfig,
    *,
    modality: TextPrompt | None = None,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Features of the class names behind a learned prefix, projected, NOT normalised (spec: CoOp, shared context).

    Args:
      params: the checkpoint's tree, frozen.
      prefix: [K,D_text] float32, the prompt.
      input_ids: [C,T] integer with K places behind the start token (`placeholder_ids`); longer padding only
        costs time.
      config: of the checkpoint.
      modality: how it is computed (`TextPrompt`: context shared, rounded, or recomputed); its length is not looked at.
      numerics: type and precision of the products.

    Returns:
      [C,E] float32.

    Raises:
      DataError: a prefix of another width, longer than the texts, or not finite.
      TextError: ids of another shape or type, outside of the vocabulary, without an end.

    >>> model = jaxzs.load("demo")
    >>> input_ids = prompt.placeholder_ids(model.tokenize(["circle", "square"])[0], 4, model.config.text)
    >>> prefix = jnp.zeros((4, model.config.text.hidden_size))
    >>> prompt.text_features(model.params, prefix, input_ids, model.config).shape
    (2, 64)
    """
    prefix, ids = jnp.asarray(prefix), jnp.asarray(input_ids)
    _check_ids(ids, config.text, None)
    if not len(ids):
        raise TextError("there are no class names: input_ids are empty")
    check_prefix(prefix, config.text.hidden_size, most=ids.shape[1] - 2)  # start and end stay
    return _text_features(params, prefix, ids, config, modality or TextPrompt(), numerics)


@functools.partial(jax.jit, static_argnames=("config", "modality", "numerics"))
def _text_features(params, prefix, ids, config, modality, numerics):
    ends = end_positions(ids, config.text)  # [C]
    half, recompute = modality.half, modality.recompute
    # Where the beginning sees what follows (SigLIP), it is not the same for every class.
    if not modality.share_context or not config.text.causal:
        x = embed_with_prefix(params, prefix, ids, half, start=int(config.text.causal))  # [C,T,D]
        return read_text(params, x, ends, config, numerics, recompute)  # [C,E]
    S = 1 + prefix.shape[0]  # start token and prefix: the same for every class
    shared = embed_with_prefix(params, prefix, ids[:1, :S], half)  # [1,S,D]
    # The names' embeddings do not depend on the prefix; only their keys and values meet it.
    x = embed_with_prefix(params, jax.lax.stop_gradient(prefix), ids, half)[:, S:]  # [C,T-S,D]
    return read_text_with_context(params, shared, x, ends - S, config, numerics, recompute)  # [C,E]


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """The textual modality: hashable settings, and the functions that training asks of every modality.

    Prompts are {"prefix": [K,D_text]}. Images are constants: their features are computed once.

    >>> modality = prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), jaxzs.load("demo").config)
    >>> prompts["prefix"].shape, modality.learning_rate
    ((4, 64), 0.1)
    """

    name: ClassVar[str] = "text"
    learning_rate: ClassVar[float] = 0.1
    length: int = 16
    deviation: float = 0.02  # of the initial normal distribution; the authors call it a variance
    half: bool = False
    share_context: bool = True
    recompute: bool = False

    def __post_init__(self) -> None:
        check_settings(self, length=1, deviation=0)

    def init(self, key: jax.Array, config: CLIPConfig) -> Prompts:
        """{"prefix": [K,D_text]} drawn from N(0, deviation^2)."""
        shape = (self.length, config.text.hidden_size)
        return {"prefix": self.deviation * jax.random.normal(key, shape, jnp.float32)}

    def restart(self, key: jax.Array, config: CLIPConfig, initial: Prompts, last: Prompts) -> Prompts:
        """Where the authors' next iteration starts: from the last prompts ("initial" is updated in place)."""
        return last

    def constant_images(
        self, params: Params, pixels: Pixels, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """What of the images no prompt changes, computed once: pixels [B,S,S,3] -> features [B,E]."""
        return encode_image(params, pixels, config, numerics=numerics)

    def plain_features(
        self, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Features of images without any prompt: [B,E]."""
        return images

    def class_features(
        self, prompts: Prompts, frozen: Frozen, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """Prompted text features [C,E]."""
        prefix, ids = prompts["prefix"], frozen.input_ids
        return text_features(frozen.params, prefix, ids, config, modality=self, numerics=numerics)

    def image_features(
        self, prompts: Prompts, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
    ) -> jax.Array:
        """The images' constant features [B,E]."""
        return images
