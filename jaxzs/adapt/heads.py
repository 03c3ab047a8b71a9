"""Heads: what every method of this package returns, and how it scores images.

Zero-shot CLIP, vision proxies and discriminant analysis with one covariance are all linear in the features, so that one
pair of arrays says it all: scores(x) = x W^T + b, the temperature included. StatA and TransCLIP add a variance a class.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs.errors import DataError
from jaxzs.proxy import checks
from jaxzs.proxy.rows import EXACT, Rows, normalize


class Head(NamedTuple):
    """A linear classifier of normalised features: scores(x) = x weights^T + bias.

    weights: [C,E] float32, the temperature included, not normalised. bias: [C] float32. A pytree: heads are averaged by
    `jax.tree.map`, trained by `jax.grad`, and swept by `jax.vmap`.

    >>> head = adapt.Head(jnp.eye(2), jnp.array([0.0, 0.5]))
    >>> print(adapt.scores(head, jnp.array([[0.0, 4.0]])).round(2))  # features are L2-normalised
    [[0.  1.5]]
    """

    weights: jax.Array
    bias: jax.Array


class GaussianHead(NamedTuple):
    """A Gaussian a class with a diagonal variance, and the text as prior (StatA, TransCLIP).

    scores(x) = prior scores + share * log N(x; means_c, variances_c), constants aside.

    prior: `Head` of the text. means, variances: [C,E] float32. share: [] what the log-likelihood counts against the
    prior. posterior: [N,C] float32 of the images that were fitted, with the graph of their neighbours where there is
    one; rows of padding are 0. None where only the head was asked for.

    >>> prior = adapt.text_head(jnp.eye(2))
    >>> head = adapt.GaussianHead(prior, jnp.eye(2), jnp.full((2, 2), 0.5), jnp.float32(0.02), None)
    >>> adapt.scores(head, jnp.eye(2)).argmax(-1).tolist()
    [0, 1]
    """

    prior: Head
    means: jax.Array
    variances: jax.Array
    share: jax.Array
    posterior: jax.Array | None


AnyHead = Head | GaussianHead


def text_head(text_proxies: ArrayLike, *, temperature: ArrayLike = 0.01) -> Head:
    """Zero-shot CLIP as a head: softmax(scores) is what CLIP says (arXiv 2103.00020, section 3.1).

    text_proxies: [C,E], any float type; L2-normalised here. temperature: > 0, 1/s for a checkpoint of logit scale s.
    Raises `DataError` (shape, values that are not finite, one class), `ConfigError` (temperature).

    >>> print(adapt.text_head(jnp.array([[3.0, 4.0], [0.0, 1.0]]), temperature=0.5).weights.round(1))
    [[1.2 1.6]
     [0.  2. ]]
    """
    text = checks.text(text_proxies, np.shape(text_proxies)[-1] if np.ndim(text_proxies) else 0)
    return linear(normalize(text), checks.scale(temperature, "temperature"))


def linear(proxies: jax.Array, temperature: jax.Array) -> Head:
    """Cosines over a temperature, proxies [C,E] normalised."""
    return Head(proxies / temperature, jnp.zeros(proxies.shape[:1], jnp.float32))


def scores(head: AnyHead, image_features: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """Scores of images: [N,C] float32, of which softmax are probabilities.

    image_features: [N,E], any float type; L2-normalised here. Rows of zeros, with which `parallel.shard_rows` fills up,
    get the bias. mask: [N] bool, False for rows of padding, which may hold anything and get anything.
    Raises `DataError` for shapes that do not fit, and values that are not finite.

    >>> head = adapt.text_head(jnp.eye(3), temperature=0.01)
    >>> adapt.scores(head, jnp.eye(3)[1:]).argmax(-1).tolist()
    [1, 2]
    """
    x = fitting(head, image_features)
    checks.finite(x, "image_features", None if mask is None else checks.row_mask(mask, len(x)))
    return scores_of(head, normalize(x))


def fitting(head: AnyHead, image_features: ArrayLike) -> jax.Array:
    """Features [N,E] of the width of a head; rows of padding may hold anything."""
    x = checks.vectors(image_features, "image_features", "[N,E]")
    checks.same(x.shape[1], width(head), "the feature sizes of image_features and the head")
    return x


def width(head: AnyHead) -> int:
    """E of a head, its shapes checked."""
    linear_part = head.prior if isinstance(head, GaussianHead) else head
    weights, bias = jnp.shape(linear_part.weights), jnp.shape(linear_part.bias)
    if len(weights) != 2 or bias != weights[:1]:
        raise DataError(f"a head has weights {weights} and bias {bias}; expected [C,E] and [C]")
    return weights[1]


def num_classes(head: AnyHead) -> int:
    """C of a head.

    >>> adapt.num_classes(adapt.text_head(jnp.eye(3)))
    3
    """
    width(head)
    return int((head.prior if isinstance(head, GaussianHead) else head).weights.shape[0])


def scores_of(head: AnyHead, x: jax.Array) -> jax.Array:
    """`scores` of normalised features [N,E]."""
    if isinstance(head, GaussianHead):
        likelihood = log_likelihood(x, head.means, head.variances)  # [N,C]
        return scores_of(head.prior, x) + head.share * likelihood
    return EXACT.logits(x, head.weights) + head.bias[None, :]  # [N,C]


def log_likelihood(x: jax.Array, means: jax.Array, variances: jax.Array) -> jax.Array:
    """-1/2 sum_e ((x - mu)^2 / var + log var): [N,E], [C,E], [C,E] -> [N,C], as one product, never [N,C,E]."""
    inverse = 1 / variances
    constant = jnp.sum(jnp.square(means) * inverse + jnp.log(variances), axis=-1)  # [C]
    both = jnp.concatenate([jnp.square(x), x], axis=-1)  # [N,2E]
    # (x - mu)^2 / var = x^2 / var - 2 x mu / var + constant: [N,2E] by [C,2E] -> [N,C].
    squared = EXACT.logits(both, jnp.concatenate([inverse, -2 * means * inverse], axis=-1))
    return -0.5 * (squared + constant[None, :])


def probabilities(head: AnyHead, rows: Rows) -> jax.Array:
    """softmax(scores) of a block: [B,C], padded rows 0."""
    return jnp.where(rows.mask[:, None], jax.nn.softmax(scores_of(head, rows.features), axis=-1), jnp.float32(0))


def scaled(head: AnyHead, scale: ArrayLike) -> AnyHead:
    """All scores times `scale`: the same classes, other probabilities."""
    if isinstance(head, GaussianHead):
        # Means and variances stay: the likelihood is scaled by its share.
        prior = jax.tree.map(lambda leaf: leaf * scale, head.prior)
        return head._replace(prior=prior, share=head.share * scale)
    return Head(head.weights * scale, head.bias * scale)
