"""The closed form: discriminant analysis on pseudo labels, from a handful of sums over the images."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.proxy.rows import EXACT, Rows, count, normalize
from jaxzs.proxy.settings import Checked
from jaxzs.proxy.sinkhorn import rounded_labels, similarity_of

FROM_THE_MEAN = 1e-5  # a class mean nearer to the overall mean of unit vectors than this is equal to it


class LabelSums(NamedTuple):
    """All that the solvers need to know of labels P and features X."""

    labelled: jax.Array  # [C, E] P^T X
    mass: jax.Array  # [C] column sums of P
    gram: jax.Array  # [E, E] X^T X
    total: jax.Array  # [E] sum of X
    num_images: jax.Array  # []


def labelled_sums(rows: Rows, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """P^T X [C, E] and the column sums of P [C] of a block."""
    labels = jnp.where(rows.mask[:, None], labels, jnp.float32(0))  # [N,C]
    return EXACT.by_class(labels, rows.features), jnp.sum(labels, axis=0)


def feature_sums(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X^T X [E, E], the sum of X [E] and the number of images of a block."""
    x = rows.features  # [N,E] zeros where masked
    return EXACT.by_class(x, x), jnp.sum(x, axis=0), count(rows)


def sums_of(rows: Rows, labels: jax.Array) -> LabelSums:
    """All sums of one block; products always in float32."""
    return LabelSums(*labelled_sums(rows, labels), *feature_sums(rows))


def label_sums(rows: Rows, text: jax.Array | None, potentials: jax.Array, settings: Checked) -> LabelSums:
    """`sums_of` with the rounded labels of the block."""
    return sums_of(rows, rounded_labels(similarity_of(rows, text), potentials, settings))


@jax.jit
def precondition(sums: LabelSums, ridge: jax.Array) -> jax.Array:
    """(A / tr A + ridge / E)^-1 with A = X^T X / n: [E, E].

    Its condition number is at most 1 + E / ridge, so float32 inverts it to four digits and more.
    """
    dim = sums.total.shape[0]
    scaled = sums.gram / jnp.maximum(jnp.trace(sums.gram), 1e-24)  # [E,E] of trace 1
    identity = jnp.eye(dim, dtype=jnp.float32)
    factor = jnp.linalg.cholesky(scaled + ridge / dim * identity)  # [E,E] L
    # L^-1 and one product take half the time of solving with L and then with L^T
    inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)  # [E,E]
    return jnp.matmul(inverse.T, inverse, precision=EXACT.precision)


@jax.jit
def closed_form(sums: LabelSums, inverse: jax.Array) -> jax.Array:
    """Class means of the labelled features, less the overall mean, times the inverse covariance: [C, E].

    Discriminant analysis on pseudo labels. `inverse` is `precondition(sums, ...)`.
    """
    means = sums.labelled / jnp.maximum(sums.mass, 1e-12)[:, None]  # [C,E]
    centred = means - (sums.total / jnp.maximum(sums.num_images, 1))[None, :]
    # of a class that holds all the images only rounding errors would be left: it keeps its mean
    away = jnp.linalg.norm(centred, axis=-1, keepdims=True) > FROM_THE_MEAN
    centred = jnp.where(away, centred, means)  # [C,E]
    # [C,E] by [E,E] -> [C,E]; of a centred mean only the direction matters.
    return normalize(jnp.matmul(normalize(centred), inverse, precision=EXACT.precision))
