"""Pseudo labels from similarities: softmax, refined by Sinkhorn (public, array-level functions)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.gamma import Gamma, held_out_gamma, is_auto, random_halves
from jaxzs.proxy.rows import Rows, block_rows, count, in_blocks, normalize, prepare, whole
from jaxzs.proxy.sinkhorn import sinkhorn, soft_labels


def sinkhorn_potentials(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    gamma: ArrayLike = 0.0,
    iterations: int = 20,
    mask: ArrayLike | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """Class potentials v of Sinkhorn: labels are softmax(X Z^T / tau_t + v); X Z^T is made by blocks only.

    InMaP, arXiv 2310.19752, section 3.3, in the log domain.

    Args:
      image_features: X [N,E], any float type; L2-normalised here.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      temperature: tau_t > 0; 0.01 in the paper, 1/s for a checkpoint of logit scale s.
      gamma: 0 to 1; 0 forces a uniform class marginal, 1 leaves the one that the text proxies predict (v = 0).
      iterations: scalings of columns and rows; 20 in the paper.
      mask: [N] bool, False for padding.
      block_size: images of a block; by default such that it has about four million similarities.

    Returns:
      v [C] float32.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x, z = jnp.array([[1.0, 0.2], [1.0, 0.3], [0.9, 0.4], [0.6, 0.5]]), jnp.eye(2)
    >>> v = proxy.sinkhorn_potentials(x, z, temperature=0.1)  # all images look like class 0
    >>> labels = jax.nn.softmax(zeroshot.similarity(x, z) / 0.1 + v[None, :])
    >>> print(labels.mean(axis=0).round(2))
    [0.5 0.5]
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    checks.label_options(temperature, gamma, iterations)
    size = block_rows(block_size, x.shape[0], z.shape[0])
    rows = Rows(rows_mask, features=x)
    return _sinkhorn_potentials(rows, z, checks.scalar(temperature), checks.scalar(gamma), iterations, size)


@partial(jax.jit, static_argnums=(4, 5))
def _sinkhorn_potentials(
    rows: Rows, text: jax.Array, temperature: jax.Array, gamma: jax.Array, iterations: int, block_size: int
) -> jax.Array:
    return sinkhorn(
        in_blocks(rows, block_size),
        normalize(text),
        count(rows),
        text.shape[0],
        temperature=temperature,
        gammas=gamma[None],
        iterations=iterations,
    )[0]


def choose_gamma(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    key: jax.Array | None,
    temperature: ArrayLike = 0.01,
    proxy_temperature: ArrayLike = 0.04,
    confidence: ArrayLike = 0.6,
    iterations: int = 20,
    mask: ArrayLike | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """What gamma="auto" chooses: two-fold held-out cross-entropy of the closed form over `GAMMAS`. Not in the paper.

    Args:
      image_features: [N,E], any float type; L2-normalised here.
      text_proxies: [C,E], any float type; L2-normalised here.
      key: random key that splits the images into halves.
      temperature: tau_t of the labels.
      proxy_temperature: tau_i of the proxies.
      confidence: as in `learn_proxies`.
      iterations: as in `sinkhorn_potentials`.
      mask: [N] bool, False for padding.
      block_size: as in `sinkhorn_potentials`.

    Returns:
      gamma, [] float32: one of 0, 0.25, 0.5, 0.75, 1.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x, z = jnp.tile(jnp.eye(4), (8, 1)), jnp.eye(4)
    >>> float(proxy.choose_gamma(x, z, key=jax.random.key(0)))
    0.0
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    checks.label_options(temperature, "auto", iterations)
    checks.positive(proxy_temperature, "proxy_temperature")
    checks.between(confidence, "confidence", 0, 1)
    rows = Rows(rows_mask, features=x, fold=random_halves(key, x.shape[0]))
    return _choose_gamma(
        rows,
        z,
        checks.scalar(temperature),
        checks.scalar(proxy_temperature),
        checks.scalar(confidence),
        iterations,
        block_rows(block_size, x.shape[0], z.shape[0]),
    )


@partial(jax.jit, static_argnums=(5, 6))
def _choose_gamma(
    rows: Rows,
    text: jax.Array,
    temperature: jax.Array,
    proxy_temperature: jax.Array,
    confidence: jax.Array,
    iterations: int,
    block_size: int,
) -> jax.Array:
    reduce, text = in_blocks(rows, block_size), normalize(text)
    scale = partial(sinkhorn, reduce, text, count(rows), text.shape[0], temperature=temperature, iterations=iterations)
    return held_out_gamma(reduce, text, scale, temperature, proxy_temperature, confidence)


def pseudo_labels(
    similarity: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    gamma: Gamma = 0.0,
    iterations: int = 20,
    mask: ArrayLike | None = None,
    image_features: ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Soft labels from cosine similarities: softmax(S / tau_t), its columns scaled by Sinkhorn.

    InMaP, arXiv 2310.19752, section 3.3.

    Args:
      similarity: S [N,C] = X Z^T of normalised features, without logit scale.
      temperature: as in `sinkhorn_potentials`.
      gamma: as in `sinkhorn_potentials`; 1 is exactly softmax(S / tau_t), "auto" chooses by `choose_gamma`.
      iterations: as in `sinkhorn_potentials`.
      mask: [N] bool, False for padding.
      image_features: [N,E], which gamma="auto" needs.
      key: random key, which gamma="auto" needs.

    Returns:
      [N,C] float32; rows sum to 1, or are 0 where masked.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> s = jnp.array([[0.30, 0.25], [0.29, 0.26], [0.28, 0.27]])
    >>> print(proxy.pseudo_labels(s, gamma=1).mean(axis=0).round(2))  # plain softmax
    [0.89 0.11]
    >>> print(proxy.pseudo_labels(s, gamma=0).mean(axis=0).round(2))  # a uniform class marginal
    [0.5 0.5]
    """
    s = checks.matrix(similarity, "similarity", "[N,C]")
    checks.classes(s.shape[1])
    rows_mask = checks.row_mask(mask, s.shape[0])
    checks.finite(s, "similarity", rows_mask)
    checks.label_options(temperature, gamma, iterations)
    rows = Rows(rows_mask, similarity=s)
    if is_auto(gamma):
        if image_features is None:
            raise ConfigError('gamma="auto" needs image_features=[N,E] beside the similarities')
        x = checks.matrix(image_features, "image_features", "[N,E]")
        checks.same(x.shape[0], s.shape[0], "the numbers of rows of image_features and similarity")
        checks.finite(x, "image_features", rows_mask)
        rows = rows._replace(features=x, fold=random_halves(key, x.shape[0]))
    return _pseudo_labels(
        rows, checks.scalar(temperature), None if is_auto(gamma) else checks.scalar(gamma), iterations
    )


@partial(jax.jit, static_argnums=3)
def _pseudo_labels(rows: Rows, temperature: jax.Array, gamma: jax.Array | None, iterations: int) -> jax.Array:
    num_images, num_classes = count(rows), rows.similarity.shape[1]
    scale = partial(
        sinkhorn, whole(rows), None, num_images, num_classes, temperature=temperature, iterations=iterations
    )
    if gamma is None:
        gamma = held_out_gamma(whole(rows), None, scale, temperature, 4 * temperature, jnp.float32(0.6))
    labels = soft_labels(prepare(rows).similarity, scale(gammas=gamma[None])[0], temperature)
    return jnp.where(rows.mask[:, None], labels, jnp.float32(0))
