"""Scores that say how sure they are: a temperature for heads, found without labels.

Adapted heads are overconfident. The text's scores are the only ones whose confidence is known to be sensible, so that a
head's scores are scaled until the mean of their highest probability is the text's (as Frolic does, arXiv 2410.19294).
 The order of the classes of an image does not change.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs.adapt.heads import AnyHead, GaussianHead, scaled, scores_of
from jaxzs.adapt.images import Images, number, over_images
from jaxzs.errors import DataError
from jaxzs.proxy.rows import Reduce, Rows

SMALLEST, LARGEST = 1e-3, 1e3  # scales looked at
STEPS = 8  # scales a pass looks at
PASSES = 8  # each narrows the interval to 1/7 of its length: to 2e-6 of a factor


def confidences(rows: Rows, head: AnyHead, scales: jax.Array) -> jax.Array:
    """Sums over a block of the highest probability with scores times each scale [K]: [K]."""
    scores = scores_of(head, rows.features)  # [B,C], once for all scales

    def one(scale: jax.Array) -> jax.Array:
        highest = jnp.max(jax.nn.softmax(scores * scale, axis=-1), axis=-1)  # [B]
        return jnp.sum(jnp.where(rows.mask, highest, jnp.float32(0)))

    # One scale after the other: [K,B,C] at once would be K times the memory of a block.
    return jax.lax.map(one, scales)


def mean_confidence(reduce: Reduce, head: AnyHead, scales: jax.Array | None = None) -> jax.Array:
    """Mean of the highest probability: [K], of scales [K], by default of 1."""
    scales = jnp.ones(1, jnp.float32) if scales is None else scales
    return reduce(confidences, head, scales) / jnp.maximum(reduce.num_images, 1)


def matching_scale(reduce: Reduce, head: AnyHead, target: jax.Array) -> jax.Array:
    """The scale at which the mean confidence is `target` [1]: []; the nearest where no scale reaches it."""

    def narrow(_: Any, interval: jax.Array) -> jax.Array:
        # In logarithms: a temperature has no natural size. Confidence grows with the scale, so that one side is kept.
        grid = jnp.linspace(interval[0], interval[1], STEPS)
        below = jnp.sum(mean_confidence(reduce, head, jnp.exp(grid)) < target)  # []
        place = jnp.clip(below, 1, STEPS - 1)  # no scale reaches the target: the end that is nearest
        return jnp.stack([grid[place - 1], grid[place]])

    interval = jnp.log(jnp.array([SMALLEST, LARGEST], jnp.float32))
    return jnp.exp(jnp.mean(reduce.loops.fori_loop(0, PASSES, narrow, interval)))


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
    return matching_scale(reduce, head, target[None])


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
