"""Scores that say how sure they are: a temperature for heads, found without labels.

Adapted heads are overconfident. The text's scores are the only ones whose confidence is known to be sensible, so that a
head's scores are scaled until the mean of their highest probability is the text's (as Frolic does, arXiv 2410.19294).
 The order of the classes of an image does not change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs.adapt.heads import AnyHead, GaussianHead, Head, linear, scaled, scores_of
from jaxzs.adapt.images import Images, number, over_images
from jaxzs.errors import DataError
from jaxzs.proxy.rows import Reduce, Rows

# Logarithms of the scales that one pass looks at first: a factor of 1000 either way is the limit.
FIRST_LOOK = np.linspace(-np.log(1000), np.log(1000), 12).astype(np.float32)
CLOSE = 1e-3  # a step of Newton's method of this length leaves an error of about its square
NARROW = 1e-6  # an interval that was halved instead
MOST_STEPS = 40
CERTAIN = 1e-7  # of float32: odds of a confidence of 1 are finite
HOPELESS = -1e4  # scores this far below the highest have a probability of 0 in float32


def below_highest(head: AnyHead, rows: Rows) -> jax.Array:
    """Scores of a block less the highest of each image, which is 0: [B,C]."""
    scores = scores_of(head, rows.features)  # [B,C]
    return jnp.minimum(scores - jnp.max(scores, axis=-1, keepdims=True), 0)


def scaled_scores(below: jax.Array, scale: jax.Array) -> jax.Array:
    """`below_highest` [B,C] times a scale []."""
    # Of scores of any size: compilers fuse a product with the difference that softmax takes, whose rounding is then
    # that of the product, and its exponential may be infinite.
    return jnp.maximum(below * scale, HOPELESS)


def confidences(rows: Rows, head: AnyHead, scales: jax.Array) -> jax.Array:
    """Sums over a block of the highest probability with scores times each scale [K]: [K]."""
    scores = below_highest(head, rows)  # [B,C], once for all scales

    def one(scale: jax.Array) -> jax.Array:
        highest = jnp.max(jax.nn.softmax(scaled_scores(scores, scale), axis=-1), axis=-1)  # [B]
        return jnp.sum(jnp.where(rows.mask, highest, jnp.float32(0)))

    # One scale after the other: [K,B,C] at once would be K times the memory of a block.
    return jax.lax.map(one, scales)


def text_and_head(rows: Rows, text: Head, head: AnyHead, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`confidences` of the text as it is [1], and of a head with each scale [K]."""
    return confidences(rows, text, jnp.ones(1, jnp.float32)), confidences(rows, head, scales)


def confidence_and_slope(rows: Rows, head: AnyHead, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum over a block of the highest probability with scores times a scale, and its slope in log scale: [], []."""
    scores = scaled_scores(below_highest(head, rows), scale)  # [B,C]
    p = jax.nn.softmax(scores, axis=-1)
    highest = jnp.max(p, axis=-1)  # [B]
    slope = -highest * jnp.sum(p * scores, axis=-1)
    return tuple(jnp.sum(jnp.where(rows.mask, of_row, jnp.float32(0))) for of_row in (highest, slope))  # type: ignore


def log_odds(confidence: jax.Array) -> jax.Array:
    """log c / (1 - c), nearly straight over log scales where c bends: two steps of Newton's method are enough."""
    inside = jnp.clip(confidence, CERTAIN, 1 - CERTAIN)
    return jnp.log(inside) - jnp.log1p(-inside)


class Search(NamedTuple):
    """Between which logarithms of scales the right one lies, and where it is looked for next: [] each."""

    low: jax.Array
    high: jax.Array
    at: jax.Array
    done: jax.Array
    steps: jax.Array


def matching_text(reduce: Reduce, text: jax.Array, temperature: jax.Array, head: AnyHead) -> jax.Array:
    """The scale at which the head is as sure as the text on these images: []."""
    own, found = reduce(text_and_head, linear(text, temperature), head, jnp.exp(FIRST_LOOK))  # one pass for both
    number = jnp.maximum(reduce.num_images, 1)
    return matching_scale(reduce, head, own[0] / number, found / number)


def matching_scale(reduce: Reduce, head: AnyHead, target: jax.Array, first: jax.Array) -> jax.Array:
    """The scale at which the mean confidence is `target` []: []; the nearest of the limits where none reaches it.

    first: [K] mean confidences at `FIRST_LOOK`. From there Newton's method, between the two scales around the target:
    confidence grows with the scale.
    """

    def step(search: Search) -> Search:
        confidence, slope = reduce(confidence_and_slope, head, jnp.exp(search.at))
        number = jnp.maximum(reduce.num_images, 1)
        return _narrowed(search, confidence / number, slope / number, target)

    running = lambda search: ~search.done & (search.steps < MOST_STEPS)  # noqa: E731
    return jnp.exp(reduce.loops.while_loop(running, step, _begun(target, first)).at)


@jax.jit
def _begun(target: jax.Array, first: jax.Array) -> Search:
    """The two scales of the first look that the right one lies between; it is done where it lies beyond them all."""
    scales = jnp.asarray(FIRST_LOOK)  # in logarithms: a temperature has no natural size
    below = jnp.sum(first < target)
    place = jnp.clip(below, 1, len(FIRST_LOOK) - 1)
    low, high, odds = scales[place - 1], scales[place], log_odds(first)
    rise = jnp.maximum(odds[place] - odds[place - 1], 1e-12)
    share = jnp.clip((log_odds(target) - odds[place - 1]) / rise, 0, 1)  # straight in between
    beyond = (below == 0) | (below == len(FIRST_LOOK))
    return Search(low, high, low + share * (high - low), beyond, jnp.zeros((), jnp.int32))


@jax.jit
def _narrowed(search: Search, confidence: jax.Array, slope: jax.Array, target: jax.Array) -> Search:
    """One step of Newton's method on the log-odds, or half of the interval where that would leave it."""
    too_small = confidence < target
    low, high = jnp.where(too_small, search.at, search.low), jnp.where(too_small, search.high, search.at)
    slope = slope / jnp.maximum(confidence * (1 - confidence), CERTAIN)
    newton = search.at + (log_odds(target) - log_odds(confidence)) / jnp.maximum(slope, 1e-12)
    inside = (newton >= low) & (newton <= high)
    at = jnp.where(inside, newton, (low + high) / 2)
    close = jnp.abs(at - search.at) <= jnp.where(inside, CLOSE, NARROW)
    return Search(low, high, at, close, search.steps + 1)


def calibrate(
    head: AnyHead, image_features: Images, confidence: ArrayLike, *, mask: ArrayLike | None = None
) -> AnyHead:
    """The head with its scores scaled until the mean of the highest probability of these images is `confidence`.

    Args:
      head: `Head` or `GaussianHead`.
      image_features: [N,E], any float type; L2-normalised here. Or a function that gives chunks for every pass.
      confidence: 0 to 1, e.g. the text's on these images, which is what `fit` takes.
      mask: [N] bool, False for padding.

    Returns:
      A head with the same predictions.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: a confidence out of range.

    >>> x = jnp.array([[1.0, 0.2], [0.3, 1.0]])
    >>> head = adapt.calibrate(adapt.text_head(jnp.eye(2)), x, 0.7)
    >>> round(float(jax.nn.softmax(adapt.scores(head, x)).max(axis=-1).mean()), 3)
    0.7
    """
    target = number(confidence, "confidence", 0, 1)
    # `over_images` wants a text [C,E] for the width of the images; `_to_confidence` does not look at it.
    prior = head.prior.weights if isinstance(head, GaussianHead) else head.weights
    # Scores come from the parameters; the posterior [N,C] of the fitted images would be copied along for nothing.
    bare = head._replace(posterior=None) if isinstance(head, GaussianHead) else head
    return scaled(head, over_images(_to_confidence, image_features, prior, (bare, target), mask=mask))


def _to_confidence(reduce: Reduce, _text: jax.Array, numbers: tuple[AnyHead, jax.Array], _: Any = ()) -> jax.Array:
    head, target = numbers
    first = reduce(confidences, head, jnp.exp(FIRST_LOOK)) / jnp.maximum(reduce.num_images, 1)
    return matching_scale(reduce, head, target, first)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of confidence (Guo et al. 2017, arXiv 1706.04599, equation 3).

    probabilities: [N,C]. labels: [N] int. bins: of equal width. Returns 0 to 1. Raises `DataError` (shapes).

    >>> adapt.expected_calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1]))
    0.3
    """
    return error_of_bins(np.array(reliability(probabilities, labels, bins)).reshape(-1, 3))


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> list[tuple[float, float, float]]:
    """Of each bin of confidence with images in it: its share of them, their mean confidence, their accuracy.

    >>> adapt.reliability(np.array([[0.75, 0.25]]), np.array([0]))
    [(1.0, 0.75, 1.0)]
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise DataError(f"probabilities {p.shape} and labels {y.shape} must be [N,C] and [N]")
    return [tuple(row) for row in bins_of(p.max(axis=1), p.argmax(axis=1) == y, bins).tolist()]


def bins_of(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> np.ndarray:
    """`reliability` of the highest probabilities [N] and whether they are right [N]: [K,3]."""
    sure, hit = np.asarray(confidence, np.float64), np.asarray(right)
    places = np.clip((sure * bins).astype(int), 0, bins - 1)  # [N]; a confidence of 1 is of the last bin
    found = [places == b for b in np.unique(places)]
    return np.array([(m.mean(), sure[m].mean(), hit[m].mean()) for m in found]).reshape(-1, 3)


def error_of_bins(found: np.ndarray) -> float:
    """Expected calibration error of `bins_of` [K,3]: 0 to 1."""
    share, sure, right = found.T
    return round(float((share * np.abs(sure - right)).sum()), 6)
