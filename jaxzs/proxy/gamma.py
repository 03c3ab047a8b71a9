"""The choice of gamma without labels: held-out cross-entropy of the closed form, over several splits into halves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, feature_sums, labelled_sums, precondition
from jaxzs.proxy.rows import EXACT, Rows
from jaxzs.proxy.settings import Checked
from jaxzs.proxy.sinkhorn import Task, rounded_labels, similarity_of, sinkhorn

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_SPLITS, FEWEST_SPLITS = 8, 2  # of the images into halves: one alone lets the key decide where images are few
IMAGES_SPLIT = 40_000  # images times splits: halves of many images differ little


def random_splits(key: Any, num_rows: int) -> jax.Array:
    """Several splits of the images into halves: [N,S] bool. Without a key always the same ones."""
    splits = min(max(IMAGES_SPLIT // max(num_rows, 1), FEWEST_SPLITS), MOST_SPLITS)
    # All keys whatever the number of splits: two splits are then the first two of eight.
    keys = jax.random.split(jax.random.key(0) if key is None else checks.random_key(key), MOST_SPLITS)
    return jnp.stack([jax.random.bernoulli(k, 0.5, (num_rows,)) for k in keys[:splits]], axis=1)


def sums_by_half(rows: Rows, text: jax.Array | None, potentials: jax.Array, settings: Checked) -> LabelSums:
    """Label sums of a block for each half and potentials [G, C]: leaves [2, ...], labelled and mass [2, G, ...]."""

    def half(second: jax.Array) -> LabelSums:
        mine = rows.mask & (rows.fold == second)  # [N]
        # The other half becomes padding: it adds nothing to any of the sums.
        part = rows._replace(mask=mine, features=jnp.where(mine[:, None], rows.features, 0.0))
        similarity = similarity_of(part, text)  # [N,C]
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
        # Each row by the proxies of the other half, which it has not helped to fit.
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
    inverse = precondition(sums, ridge)  # [E,E] of the images alone: one for all labels

    def one(labelled: jax.Array, mass: jax.Array) -> jax.Array:
        return closed_form(sums._replace(labelled=labelled, mass=mass), inverse)

    return jax.vmap(one)(sums.labelled, sums.mass)


def sums_by_split(rows: Rows, text: jax.Array | None, potentials: jax.Array, settings: Checked) -> LabelSums:
    """`sums_by_half` for each split: leaves [S, 2, ...]."""

    def of(fold: jax.Array) -> LabelSums:
        return sums_by_half(rows._replace(fold=fold), text, potentials, settings)

    return jax.lax.map(of, rows.fold.T)


def losses_by_split(
    rows: Rows, text: jax.Array | None, potentials: jax.Array, proxies: jax.Array, settings: Checked
) -> jax.Array:
    """`held_out_loss` for each split with its proxies [S, 2, G, C, E]: [S, G]."""

    def of(split: tuple[jax.Array, jax.Array]) -> jax.Array:
        fold, own = split
        return held_out_loss(rows._replace(fold=fold), text, potentials, own, settings)

    return jax.lax.map(of, (rows.fold.T, proxies))


def held_out_losses(task: Task, settings: Checked) -> jax.Array:
    """How badly the closed form of one half predicts the other, for each split and gamma of `GAMMAS`: [S, G]."""
    # Labels are those of all images, for each gamma; only the proxies are of a half.
    potentials = sinkhorn(task, jnp.array(GAMMAS, jnp.float32), settings)  # [G,C]
    sums = task.reduce(sums_by_split, task.text, potentials, settings)

    def of_halves(halves: LabelSums) -> jax.Array:
        return jax.lax.map(lambda half: closed_forms(half, settings.ridge), halves)  # [2,G,C,E]

    # One after the other: LAPACK's batched triangular solve waits, inside the threads that compute, for those threads.
    # Several host devices on two cores then wait for ever (jaxlib 0.10).
    proxies = jax.lax.map(of_halves, sums)  # [S,2,G,C,E]
    return task.reduce(losses_by_split, task.text, potentials, proxies, settings)


def held_out_gamma(task: Task, settings: Checked) -> jax.Array:
    """The gamma of `GAMMAS` with the least loss over all splits: []."""
    losses = held_out_losses(task, settings)
    return jnp.array(GAMMAS, jnp.float32)[jnp.argmin(jnp.sum(losses, axis=0))]
