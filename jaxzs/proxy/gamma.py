"""The choice of gamma without labels: two-fold held-out cross-entropy of the closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, feature_sums, labelled_sums, precondition
from jaxzs.proxy.rows import EXACT, Rows
from jaxzs.proxy.settings import Checked
from jaxzs.proxy.sinkhorn import Task, rounded_labels, similarity_of, sinkhorn

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def random_halves(key: Any, num_rows: int) -> jax.Array:
    """Which of two halves a row belongs to: [N] bool."""
    if key is None:
        raise ConfigError('gamma="auto" splits the images at random: give key=jax.random.key(0) or another')
    return jax.random.bernoulli(checks.random_key(key), 0.5, (num_rows,))


def sums_by_half(rows: Rows, text: jax.Array | None, potentials: jax.Array, settings: Checked) -> LabelSums:
    """Label sums of a block for each half and potentials [G, C]: leaves [2, ...], labelled and mass [2, G, ...]."""

    def half(second: jax.Array) -> LabelSums:
        mine = rows.mask & (rows.fold == second)
        part = rows._replace(mask=mine, features=jnp.where(mine[:, None], rows.features, 0.0))
        similarity = similarity_of(part, text)
        products, masses = jax.lax.map(
            lambda v: labelled_sums(part, rounded_labels(similarity, v, settings)), potentials
        )
        return LabelSums(products, masses, *feature_sums(part))

    return jax.lax.map(half, jnp.array([False, True]))


def held_out_loss(
    rows: Rows, text: jax.Array | None, potentials: jax.Array, proxies: jax.Array, settings: Checked
) -> jax.Array:
    """Cross-entropy of a block's labels with the proxies [2, G, C, E] fitted on the other half: [G]."""
    similarity = similarity_of(rows, text)

    def one(arguments: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        potentials, from_first, from_second = arguments
        logits = jnp.where(
            rows.fold[:, None],  # a row of the second half
            EXACT.logits(rows.features, from_first),
            EXACT.logits(rows.features, from_second),
        )  # [N,C]
        log_q = jax.nn.log_softmax(logits / settings.temperature, axis=-1)
        loss = -jnp.sum(rounded_labels(similarity, potentials, settings) * log_q, axis=-1)  # [N]
        return jnp.sum(jnp.where(rows.mask, loss, jnp.float32(0)))

    return jax.lax.map(one, (potentials, proxies[0], proxies[1]))


@jax.jit
def closed_forms(sums: LabelSums, ridge: jax.Array) -> jax.Array:
    """Proxies [G, C, E] of labels [G, ...] of the same images."""
    inverse = precondition(sums, ridge)

    def one(labelled: jax.Array, mass: jax.Array) -> jax.Array:
        return closed_form(sums._replace(labelled=labelled, mass=mass), inverse)

    return jax.vmap(one)(sums.labelled, sums.mass)


def held_out_gamma(task: Task, settings: Checked) -> jax.Array:
    """The gamma of `GAMMAS` whose labels the closed form, fitted on one half, predicts best on the other: []."""
    gammas = jnp.array(GAMMAS, jnp.float32)
    potentials = sinkhorn(task, gammas, settings)  # [G,C]
    sums = task.reduce(sums_by_half, task.text, potentials, settings)
    proxies = jax.vmap(closed_forms, in_axes=(0, None))(sums, settings.ridge)  # [2,G,C,E]
    loss = task.reduce(held_out_loss, task.text, potentials, proxies, settings)  # [G]
    return gammas[jnp.argmin(loss)]
