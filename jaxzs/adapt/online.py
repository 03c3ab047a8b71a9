"""Streams: each image is labelled as it comes, from what the images before it have taught.

`onzeta`: Qian and Hu, "Online Zero-Shot Classification with CLIP" (ECCV 2024, arXiv 2408.13320). `tda`: Karmanov et al.
"Efficient Test-Time Adaptation of Vision-Language Models" (CVPR 2024, arXiv 2403.18293). `stata`: StatA on batches, its
own protocol, which keeps nothing between them. Each is one scan whose state is an explicit pytree: a stream that is cut
anywhere and goes on from the state gives the same labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs import parallel
from jaxzs.adapt import gaussian
from jaxzs.adapt.graph import check_neighbours
from jaxzs.adapt.images import number
from jaxzs.errors import ConfigError, DataError
from jaxzs.proxy import checks
from jaxzs.proxy.rows import EXACT, normalize

POSITIVE, NEGATIVE = 3, 2  # images that TDA's caches hold for each class
CERTAIN, DOUBTFUL = 0.2, 0.5  # bounds of the normalised entropy of images in the negative cache
NOT_CLEAR = 0.03  # classes below this probability are clear of an image in the negative cache


class Streamed(NamedTuple):
    """What a stream has said so far.

    probabilities: [N,C] float32 of each image when it came; rows of padding are 0. state: to go on from, a pytree.
    """

    probabilities: jax.Array
    state: Any


class Stream(NamedTuple):
    """The images and text that all streams see."""

    features: jax.Array  # [N,E] normalised
    mask: jax.Array  # [N]
    text: jax.Array  # [C,E] normalised


# OnZeta


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "vision_temperature", "rate", "marginal_rate", "marginal", "mix", "horizon"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class OnZeta:
    """Options of `onzeta`; every number may be traced.

    temperature: > 0 of the text, 1/s. vision_temperature: > 0 of the proxies, 4/s. rate: of their steps (c_w).
    marginal_rate: of the class potentials (c_r). marginal: 0 to 1; 1 asks that each class has its equal share of the
    images at least, as published, which ruins streams that are not balanced; 0 asks nothing. mix: 0 to 1, weight of
    the vision proxies at the end (beta). horizon: number of images expected, at which that weight is reached.

    >>> adapt.online.OnZeta(marginal=1.0).mix
    0.8
    """

    temperature: Any = 0.01
    vision_temperature: Any = 0.04
    rate: Any = 0.5
    marginal_rate: Any = 20.0
    marginal: Any = 0.0
    mix: Any = 0.8
    horizon: Any = 1000


class OnZetaState(NamedTuple):
    """proxies: [C,E] of unit length. potentials: [C]. seen: [] number of images."""

    proxies: jax.Array
    potentials: jax.Array
    seen: jax.Array


def onzeta(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: OnZeta | None = None,
    *,
    state: OnZetaState | None = None,
    mask: ArrayLike | None = None,
) -> Streamed:
    """OnZeta: vision proxies that learn from every image once, arXiv 2408.13320, algorithm 1.

    Args:
      image_features: [N,E] in the order in which they come, any float type; L2-normalised here.
      text_proxies: [C,E], any float type; L2-normalised here.
      settings: by default `OnZeta()`, with a horizon of these N images.
      state: of the stream so far; None begins one.
      mask: [N] bool, False for padding, which teaches nothing.

    Returns:
      `Streamed` with an `OnZetaState`.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.1, 1.0], [0.9, 0.0]])
    >>> first = adapt.onzeta(x[:2], jnp.eye(2), adapt.online.OnZeta(horizon=3))
    >>> rest = adapt.onzeta(x[2:], jnp.eye(2), adapt.online.OnZeta(horizon=3), state=first.state)
    >>> rest.probabilities.argmax(-1).tolist(), int(rest.state.seen)
    ([0], 3)
    """
    stream = _stream(image_features, text_proxies, mask)
    settings = OnZeta(horizon=len(stream.mask)) if settings is None else _of_type(settings, OnZeta)
    highest = {"marginal": 1.0, "mix": 1.0}
    least = {"temperature": 1e-37, "vision_temperature": 1e-37, "horizon": 1.0}
    return _onzeta(stream, _checked(settings, least, highest), state)


@jax.jit
def _onzeta(stream: Stream, settings: OnZeta, state: OnZetaState | None) -> Streamed:
    text, options = stream.text, settings
    begun = OnZetaState(text, jnp.zeros(text.shape[:1], jnp.float32), jnp.int32(0)) if state is None else state
    num_classes = text.shape[0]

    def one(state: OnZetaState, image: tuple[jax.Array, jax.Array]) -> tuple[OnZetaState, jax.Array]:
        x, counts = image  # [E], []
        number = (state.seen + 1).astype(jnp.float32)  # of the image, from 1 on
        # [C] the text's label; potentials rho multiply it by exp(rho).
        by_text = jax.nn.softmax(EXACT.logits(x[None], text)[0] / options.temperature + state.potentials)
        pressure = options.marginal_rate / jnp.sqrt(number) * (by_text - options.marginal / num_classes)
        # [C], by the proxies before this image moves them.
        by_proxies = jax.nn.softmax(EXACT.logits(x[None], state.proxies)[0] / options.vision_temperature)
        # Proxies earn their weight with the images seen, beta at the horizon and no more beyond.
        share = options.mix * jnp.sqrt(jnp.minimum(number / options.horizon, 1))
        step = options.rate / jnp.sqrt(number) / options.vision_temperature
        moved = state.proxies - step * (by_proxies - by_text)[:, None] * x[None, :]  # [C,E]
        new = OnZetaState(
            moved / jnp.sqrt(jnp.sum(jnp.square(moved), axis=-1, keepdims=True)),
            # Never below 0, as published: each class is to have its share at least, not exactly.
            jnp.maximum(state.potentials - pressure, 0),
            state.seen + 1,
        )
        return _if_counted(counts, new, state, share * by_proxies + (1 - share) * by_text)

    ended, probabilities = jax.lax.scan(one, begun, (stream.features, stream.mask))
    return Streamed(probabilities, ended)


# TDA


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "positive", "positive_sharpness", "negative", "negative_sharpness"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TDA:
    """Options of `tda`; every number may be traced.

    temperature: > 0 of the text. positive, negative: >= 0, weights of the two caches. positive_sharpness,
    negative_sharpness: >= 0, how fast a cached image loses weight with its distance.

    >>> adapt.online.TDA(negative=0.0).positive
    2.0
    """

    temperature: Any = 0.01
    positive: Any = 2.0
    positive_sharpness: Any = 5.0
    negative: Any = 0.117
    negative_sharpness: Any = 1.0


class Cache(NamedTuple):
    """The k images of lowest entropy of each class: keys [C,k,E], entropies [C,k] (inf: empty), values [C,k,C]."""

    keys: jax.Array
    entropies: jax.Array
    values: jax.Array


class TDAState(NamedTuple):
    """The two caches of fixed shape."""

    positive: Cache
    negative: Cache


def tda(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: TDA | None = None,
    *,
    state: TDAState | None = None,
    mask: ArrayLike | None = None,
) -> Streamed:
    """TDA: caches of confident images, and of images in doubt, arXiv 2403.18293, equations 4 to 8.

    Arguments and errors as `onzeta`. The threshold of doubt is the official code's (nats over log2 C), not the paper's.

    >>> x = jnp.array([[1.0, 0.1], [0.1, 1.0], [0.9, 0.0]])
    >>> found = adapt.tda(x, jnp.eye(2))
    >>> found.probabilities.argmax(-1).tolist(), found.state.positive.keys.shape
    ([0, 1, 0], (2, 3, 2))
    """
    stream = _stream(image_features, text_proxies, mask)
    settings = TDA() if settings is None else _of_type(settings, TDA)
    return _tda(stream, _checked(settings, {"temperature": 1e-37}, {}), state)


@jax.jit
def _tda(stream: Stream, settings: TDA, state: TDAState | None) -> Streamed:
    text = stream.text
    begun = TDAState(_empty(text, POSITIVE), _empty(text, NEGATIVE)) if state is None else state

    def one(state: TDAState, image: tuple[jax.Array, jax.Array]) -> tuple[TDAState, jax.Array]:
        x, counts = image
        # Update before the prediction, as published: the image may be in its own cache.
        new = tda_update(state, x, text, settings)
        return _if_counted(counts, new, state, jax.nn.softmax(tda_scores(new, x, text, settings)))

    ended, probabilities = jax.lax.scan(one, begun, (stream.features, stream.mask))
    return Streamed(probabilities, ended)


def tda_update(state: TDAState, x: jax.Array, text: jax.Array, settings: TDA) -> TDAState:
    """The caches with one image [E] more."""
    log_p = exact_log_softmax(EXACT.logits(x[None], text)[0] / settings.temperature)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * jnp.maximum(log_p, -1e30))
    doubt = entropy / jnp.log2(jnp.float32(len(text)))  # nats over bits, as in the official code
    # Neither sure nor hopeless: such images say which classes theirs is not.
    doubtful = (doubt > CERTAIN) & (doubt < DOUBTFUL)
    # Entropy inf is sorted to the end and falls out: the cache stays as it is.
    negative = _put(state.negative, jnp.argmax(p), jnp.where(doubtful, entropy, jnp.inf), x, p)
    return TDAState(_put(state.positive, jnp.argmax(p), entropy, x, p), negative)


def exact_log_softmax(scores: jax.Array) -> jax.Array:
    """log softmax of [C], exact for a class that is nearly certain: caches order images by what is missing to 1."""
    best = jnp.argmax(scores)
    below = (scores - scores[best]).at[best].set(0)  # whatever a compiler makes of the difference
    others = jnp.sum(jnp.exp(below.at[best].set(-jnp.inf)))
    return below - jnp.log1p(others)


def _put(cache: Cache, place: jax.Array, entropy: jax.Array, x: jax.Array, p: jax.Array) -> Cache:
    """The cache with an image in the row of its class, which keeps those of lowest entropy; the new one goes last."""

    def insert(row: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([row[place], new[None]])  # [k+1,...]

    own = jax.tree.map(insert, cache, Cache(x, entropy, p))
    kept = jnp.argsort(own.entropies, stable=True)[:-1]  # [k]
    return jax.tree.map(lambda row, new: row.at[place].set(new[kept]), cache, own)


def tda_scores(state: TDAState, x: jax.Array, text: jax.Array, settings: TDA) -> jax.Array:
    """Scores [C] of an image [E]: text, attracted by the positive cache and repelled by the negative one."""

    def near(cache: Cache, sharpness: jax.Array) -> jax.Array:
        similarity = jnp.einsum("cke,e->ck", cache.keys, x, precision=EXACT.precision)  # [C,k]
        return jnp.where(jnp.isfinite(cache.entropies), jnp.exp(-sharpness * (1 - similarity)), 0)

    attract = jnp.sum(near(state.positive, settings.positive_sharpness), axis=-1)  # [C]
    possible = (state.negative.values > NOT_CLEAR) & (state.negative.values < 1)  # [C,k,C]
    # [C,k,1] by [C,k,C] -> [C]: an image in doubt speaks against every class it may be of.
    repel = jnp.sum(
        near(state.negative, settings.negative_sharpness)[:, :, None] * possible.astype(jnp.float32), axis=(0, 1)
    )
    by_text = EXACT.logits(x[None], text)[0] / settings.temperature
    return by_text + settings.positive * attract - settings.negative * repel


def _empty(text: jax.Array, size: int) -> Cache:
    num_classes, dim = text.shape
    return Cache(
        jnp.zeros((num_classes, size, dim), jnp.float32),
        jnp.full((num_classes, size), jnp.inf, jnp.float32),
        jnp.zeros((num_classes, size, num_classes), jnp.float32),
    )


# StatA


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "laplacian", "anchor"],
    meta_fields=["batch", "iterations", "neighbours"],
)
@dataclasses.dataclass(frozen=True)
class StatA:
    """Options of `stata`. batch: images that are labelled together; the others as in `adapt.stata`.

    >>> adapt.online.StatA(batch=32).anchor
    1.0
    """

    temperature: Any = 0.01
    laplacian: Any = 1.0
    anchor: Any = 1.0
    batch: int = 64
    iterations: int = 10
    neighbours: int = 3

    def __post_init__(self) -> None:
        checks.whole_number(self.batch, "batch")


def stata(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: StatA | None = None,
    *,
    state: jax.Array | None = None,
    mask: ArrayLike | None = None,
) -> Streamed:
    """StatA on one batch after the other, nothing kept between them: the safe one (arXiv 2501.03729, section 5).

    Arguments and errors as `onzeta`; the state is the number of images seen.

    >>> x = jnp.array([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.8]])
    >>> found = adapt.online.stata(x, jnp.eye(2), adapt.online.StatA(batch=2, neighbours=1))
    >>> found.probabilities.argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    stream = _stream(image_features, text_proxies, mask)
    settings = StatA() if settings is None else _of_type(settings, StatA)
    check_neighbours(settings.neighbours)
    least = {"temperature": 1e-37, "anchor": 1e-37, "batch": 1}
    return _stata(stream, _checked(settings, least, {}), jnp.int32(0) if state is None else state)


@jax.jit
def _stata(stream: Stream, settings: StatA, seen: jax.Array) -> Streamed:
    num_rows, size = len(stream.mask), min(settings.batch, len(stream.mask))
    num_batches = -(-num_rows // size)
    padding = num_batches * size - num_rows
    features = jnp.pad(stream.features, ((0, padding), (0, 0))).reshape(num_batches, size, -1)  # [.,B,E]
    masks = jnp.pad(stream.mask, (0, padding)).reshape(num_batches, size)  # [.,B]
    of_batch = jnp.int32(settings.iterations), jnp.bool_(False)
    numbers = gaussian.Numbers(settings.temperature, settings.laplacian, settings.anchor, *of_batch)

    def one(seen: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, mask = batch
        # Nothing goes from batch to batch but the count, so a stream sorted by class cannot mislead it.
        posterior = gaussian._stata(x, stream.text, mask, numbers, settings.neighbours).posterior
        return seen + jnp.sum(mask, dtype=jnp.int32), posterior

    seen, posteriors = jax.lax.scan(one, seen, (features, masks))
    return Streamed(posteriors.reshape(num_batches * size, -1)[:num_rows], seen)  # [N,C]


# All


Settings = OnZeta | TDA | StatA


def stream(
    batches: Iterable[np.ndarray], text_proxies: ArrayLike, settings: Settings | None = None, *, state: Any = None
) -> Iterator[Streamed]:
    """Label batches as they arrive: what each one says, with the state after it.

    Args:
      batches: arrays [n,E] of any n; padded to the longest so far, so that few programs are compiled.
      text_proxies: [C,E].
      settings: `OnZeta`, `TDA` or, by default, `StatA`; says which method labels them.
      state: to go on from; None begins.

    Yields:
      `Streamed` of each batch, its probabilities without padding.

    Raises:
      DataError, ConfigError: as `onzeta`.

    >>> arriving = iter([np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32)[2:]])
    >>> [int(one.probabilities.argmax(-1)[0]) for one in adapt.online.stream(arriving, jnp.eye(3), adapt.online.TDA())]
    [0, 2]
    """
    settings = StatA() if settings is None else settings
    method = {OnZeta: onzeta, TDA: tda, StatA: stata}.get(type(settings))
    if method is None:
        raise ConfigError(f"settings is {settings!r}; expected OnZeta(...), TDA(...) or StatA(...)")
    length = 1
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 2:
            raise DataError(f"a batch has shape {batch.shape}; expected two axes [n,E]")
        if len(batch) == 0:
            continue
        length = max(length, len(batch))
        padded, mask = parallel.pad_rows(batch, length)
        found = method(padded, text_proxies, settings, state=state, mask=mask)  # type: ignore[operator]
        state = found.state
        yield Streamed(found.probabilities[: len(batch)], state)


def _if_counted(counts: jax.Array, new: Any, old: Any, probabilities: jax.Array) -> tuple[Any, jax.Array]:
    """Padding leaves the state as it is and has no probabilities."""
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, old), jnp.where(counts, probabilities, 0)


def _stream(image_features: ArrayLike, text_proxies: ArrayLike, mask: ArrayLike | None) -> Stream:
    x, text, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    x = jnp.where(rows_mask[:, None], x.astype(jnp.float32), jnp.float32(0))
    return Stream(unit(x), rows_mask, unit(text))


def unit(x: jax.Array) -> jax.Array:
    """Rows of unit length; those that have it up to rounding stay bit by bit what they are.

    OnZeta's class potentials begin with steps of 20: a last digit more or less is another stream after 100 images.
    """
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(jnp.abs(squared - 1) < 1e-6, x, normalize(x))


def _of_type(settings: Any, kind: type) -> Any:
    if not isinstance(settings, kind):
        raise ConfigError(f"settings is {settings!r}; expected {kind.__name__}(...)")
    return settings


def _checked(settings: Any, least: dict[str, float], highest: dict[str, float]) -> Any:
    """The settings with every number checked, 0 or more unless said, and a float32 scalar."""
    leaves = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    numbers = {
        name: number(value, name, least.get(name, 0.0), highest.get(name, 1e37))
        for name, value in leaves.items()
        if name not in ("batch", "iterations", "neighbours")
    }
    return dataclasses.replace(settings, **numbers)
