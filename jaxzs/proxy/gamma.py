"""The choice of gamma without labels: two-fold held-out cross-entropy of the closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy.closed_form import LabelSums, closed_form, feature_sums, labelled_sums, precondition
from jaxzs.proxy.rows import EXACT, Reduce, Rows
from jaxzs.proxy.sinkhorn import round_labels, similarity_of, soft_labels

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
Gamma = ArrayLike | Literal["auto"]


def is_auto(gamma: Any) -> bool:
    return isinstance(gamma, str) and gamma == "auto"


def random_halves(key: jax.Array | None, num_rows: int) -> jax.Array:
    """Which of two halves a row belongs to: [N] bool."""
    if key is None:
        raise ConfigError('gamma="auto" splits the images at random: give key=jax.random.key(0) or another')
    return jax.random.bernoulli(key, 0.5, (num_rows,))


def sums_by_half(
    rows: Rows, text: jax.Array | None, potentials: jax.Array, temperature: jax.Array, confidence: jax.Array
) -> LabelSums:
    """Label sums of a block for each half and potentials [G, C]: leaves [2, ...], labelled and mass [2, G, ...]."""

    def half(second: jax.Array) -> LabelSums:
        mine = rows.mask & (rows.fold == second)
        part = rows._replace(mask=mine, features=jnp.where(mine[:, None], rows.features, 0.0))
        similarity = similarity_of(part, text)

        def labelled(potentials: jax.Array) -> tuple[jax.Array, jax.Array]:
            labels = round_labels(soft_labels(similarity, potentials, temperature), confidence)
            return labelled_sums(part, labels)

        products, masses = jax.lax.map(labelled, potentials)
        return LabelSums(products, masses, *feature_sums(part))

    return jax.lax.map(half, jnp.array([False, True]))


def held_out_loss(
    rows: Rows,
    text: jax.Array | None,
    potentials: jax.Array,
    proxies: jax.Array,
    temperature: jax.Array,
    proxy_temperature: jax.Array,
    confidence: jax.Array,
) -> jax.Array:
    """Cross-entropy of a block's labels with the proxies [2, G, C, E] fitted on the other half: [G]."""
    similarity = similarity_of(rows, text)

    def one(arguments: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        potentials, from_first, from_second = arguments
        labels = round_labels(soft_labels(similarity, potentials, temperature), confidence)
        logits = jnp.where(
            rows.fold[:, None],  # a row of the second half
            EXACT.logits(rows.features, from_first),
            EXACT.logits(rows.features, from_second),
        )
        loss = -jnp.sum(labels * jax.nn.log_softmax(logits / proxy_temperature, axis=-1), axis=-1)
        return jnp.sum(jnp.where(rows.mask, loss, jnp.float32(0)))

    return jax.lax.map(one, (potentials, proxies[0], proxies[1]))


def held_out_gamma(
    reduce: Reduce,
    text: jax.Array | None,
    scale: Callable[..., jax.Array],
    temperature: jax.Array,
    proxy_temperature: jax.Array,
    confidence: jax.Array,
    ridge: ArrayLike = 1.0,
) -> jax.Array:
    """The gamma of `GAMMAS` whose labels the closed form, fitted on one half, predicts best on the other: [].

    `scale(gammas=[G])` are Sinkhorn's potentials [G, C] of all rows.
    """
    gammas = jnp.array(GAMMAS, jnp.float32)
    potentials = scale(gammas=gammas)
    sums = reduce(sums_by_half, text, potentials, temperature, confidence)

    def fit(sums: LabelSums) -> jax.Array:
        inverse = precondition(sums, ridge)

        def one(labelled: jax.Array, mass: jax.Array) -> jax.Array:
            return closed_form(sums._replace(labelled=labelled, mass=mass), inverse)

        return jax.vmap(one)(sums.labelled, sums.mass)

    proxies = jax.vmap(fit)(sums)
    loss = reduce(held_out_loss, text, potentials, proxies, temperature, proxy_temperature, confidence)
    return gammas[jnp.argmin(loss)]
