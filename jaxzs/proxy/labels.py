"""Pseudo labels from similarities: softmax, refined by Sinkhorn (public, array-level functions)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError, renamed
from jaxzs.proxy import checks
from jaxzs.proxy.fit import IN_SETTINGS, task_of
from jaxzs.proxy.gamma import GAMMAS, best_gamma, compared, random_splits, with_gamma
from jaxzs.proxy.rows import Rows, Whole, count, prepare, where_rows_lie
from jaxzs.proxy.settings import DEFAULTS, PAPER_LOGIT_SCALE, Checked, Gamma, Settings, for_rows, in_float32
from jaxzs.proxy.sinkhorn import Task, sinkhorn, soft_labels


@renamed(block_size="nothing: blocks have about four million similarities")
def sinkhorn_potentials(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    gamma: ArrayLike = 0.0,
    iterations: int = 20,
    mask: ArrayLike | None = None,
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

    Returns:
      v [C] float32.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros.
      ConfigError: options out of range.

    >>> x, z = jnp.array([[1.0, 0.2], [1.0, 0.3], [0.9, 0.4], [0.6, 0.5]]), jnp.eye(2)
    >>> v = proxy.sinkhorn_potentials(x, z, temperature=0.1)  # all images look like class 0
    >>> labels = jax.nn.softmax(zeroshot.similarity(x, z) / 0.1 + v[None, :])
    >>> print(labels.mean(axis=0).round(2))
    [0.5 0.5]
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    settings = _label_settings(temperature, gamma, iterations)
    if settings.auto:
        raise ConfigError('gamma is "auto", which potentials alone do not tell; expected a number from 0 to 1')
    rows = Rows(rows_mask, features=x)
    return _sinkhorn_potentials(rows, z, for_rows(settings, rows, z.shape[0]))


def _label_settings(temperature: ArrayLike, gamma: Gamma, iterations: int) -> Checked:
    """Options of labels alone; gamma="auto" compares its candidates at the paper's 4 tau_t."""
    checks.whole_number(iterations, "iterations")
    tau = checks.scale(temperature, "temperature")
    return in_float32(Settings(gamma, label_temperature=tau, temperature=4 * tau, sinkhorn_iterations=iterations))


@jax.jit
def _sinkhorn_potentials(rows: Rows, text: jax.Array, settings: Checked) -> jax.Array:
    def run(rows: Rows, text: jax.Array, settings: Checked) -> jax.Array:
        return sinkhorn(task_of(rows, text, settings), settings.gamma[None], settings)[0]

    return where_rows_lie(run, settings.sharding)(rows, text, settings)


@renamed(
    **(IN_SETTINGS | {"proxy_temperature": IN_SETTINGS["temperature"], "temperature": IN_SETTINGS["label_temperature"]})
)
def choose_gamma(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    settings: Settings = DEFAULTS,
    *,
    logit_scale: ArrayLike = PAPER_LOGIT_SCALE,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """What gamma="auto" chooses: held-out cross-entropy of the closed form over `GAMMAS`. Not in the paper.

    The images are split into halves several times (eight, fewer of more than 5,000 images), the closed form of each
    half predicts the labels of the other, and losses are added up. `adapt.choose` tells how many splits agree.

    Args:
      image_features: [N,E], any float type; L2-normalised here.
      text_proxies: [C,E], any float type; L2-normalised here.
      settings: `Settings`; its gamma and solver do not matter.
      logit_scale: as in `proxy.fit`.
      mask: [N] bool, False for padding.
      key: of the splits; by default always the same ones.

    Returns:
      gamma, [] float32: one of 0, 0.25, 0.5, 0.75, 1.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros.
      ConfigError: options out of range.

    >>> x, z = jnp.tile(jnp.eye(4), (8, 1)), jnp.eye(4)
    >>> float(proxy.choose_gamma(x, z))
    0.0
    """
    x, z, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    checked = in_float32(settings, logit_scale)
    rows = Rows(rows_mask, features=x, fold=random_splits(key, x.shape[0]))
    return _choose_gamma(rows, z, for_rows(checked, rows, z.shape[0]))


@jax.jit
def _choose_gamma(rows: Rows, text: jax.Array, settings: Checked) -> jax.Array:
    def run(rows: Rows, text: jax.Array, settings: Checked) -> jax.Array:
        losses = compared(task_of(rows, text, settings), settings).losses
        return jnp.array(GAMMAS, jnp.float32)[best_gamma(losses)]

    return where_rows_lie(run, settings.sharding)(rows, text, settings)


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
      key: as in `choose_gamma`.

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
    settings = _label_settings(temperature, gamma, iterations)
    s, rows_mask = checks.similarities(similarity, mask, settings.label_temperature)
    rows = Rows(rows_mask, similarity=s)
    if settings.auto:
        if image_features is None:
            raise ConfigError('gamma="auto" needs image_features=[N,E] beside the similarities')
        x = checks.vectors(image_features, "image_features", "[N,E]")
        checks.same(x.shape[0], s.shape[0], "the numbers of rows of image_features and similarity")
        checks.directions(x, "image_features", rows_mask)
        rows = rows._replace(features=x, fold=random_splits(key, x.shape[0]))
    return _pseudo_labels(rows, settings)


@jax.jit
def _pseudo_labels(rows: Rows, settings: Checked) -> jax.Array:
    prepared = prepare(rows)
    # Not by blocks: the similarities that were given have the size of the labels that are asked for.
    task = Task(Whole(prepared), count(rows), rows.similarity.shape[1])
    potentials, _ = with_gamma(task, settings)  # [C]
    labels = soft_labels(prepared.similarity, potentials, settings.label_temperature)  # [N,C]
    return jnp.where(rows.mask[:, None], labels, jnp.float32(0))
