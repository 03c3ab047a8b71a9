"""Pseudo labels of one block of images, and Sinkhorn's iterations on class potentials.

Sinkhorn runs in the log domain and keeps one potential per class: the scheme ends with a scaling of rows,
so its labels are softmax(similarity / temperature + potentials). That is exact where the plain scheme
underflows (a class that nobody predicts), and labels of any block of images can be computed again from [C].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.proxy import checks
from jaxzs.proxy.rows import EXACT, Reduce, Rows
from jaxzs.proxy.settings import Checked


class Task(NamedTuple):
    """Images, seen through sums over them, and the classes they may belong to."""

    reduce: Reduce
    num_images: jax.Array  # [] padding left out
    num_classes: int
    text: jax.Array | None = None  # [C,E] normalised, or None where the rows bring their similarities


def soft_labels(similarity: jax.Array, potentials: jax.Array, label_temperature: jax.Array) -> jax.Array:
    """softmax(S / tau_t + potentials): [N, C], [C] -> [N, C]."""
    return jax.nn.softmax(similarity / label_temperature + potentials[None, :], axis=-1)  # [N,C]


def round_labels(labels: ArrayLike, confidence: ArrayLike = 0.6) -> jax.Array:
    """Rows whose largest entry is strictly above `confidence` become one-hot there: [N, C] -> [N, C].

    InMaP (arXiv 2310.19752): labels above 0.6 are taken as certain. labels: any float type, which the result has.
    confidence: 0 to 1. Raises `DataError` for labels that are not finite, `ConfigError` for another confidence.

    >>> print(proxy.round_labels(jnp.array([[0.7, 0.3], [0.55, 0.45]])))
    [[1.   0.  ]
     [0.55 0.45]]
    """
    labels = checks.matrix(labels, "labels", "[N,C]")
    checks.finite(labels, "labels")
    return rounded(labels, checks.between(confidence, "confidence", 0, 1).astype(labels.dtype))


def rounded(labels: jax.Array, confidence: jax.Array) -> jax.Array:
    """`round_labels` without its checks."""
    sure = jnp.max(labels, axis=-1, keepdims=True) > confidence  # [N,1] strictly, as the paper
    return jnp.where(sure, largest_of_row(labels).astype(labels.dtype), labels)


def largest_of_row(x: jax.Array) -> jax.Array:
    """Where each row has its largest entry, of equal ones the first: [.,C] -> [.,C] bool."""
    # Two reductions that processors do several entries at a time; argmax goes entry by entry, and takes as long as exp.
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = x == jnp.max(x, axis=-1, keepdims=True)
    return place == jnp.min(jnp.where(largest, place, x.shape[-1]), axis=-1, keepdims=True)


def similarity_of(rows: Rows, text: jax.Array | None) -> jax.Array:
    """S = X Z^T [N, C] of a block, always in float32, or the one that the rows bring."""
    if rows.similarity is not None:
        return rows.similarity
    assert text is not None
    return EXACT.logits(rows.features, text)  # [N,C]


def rounded_labels(similarity: jax.Array, potentials: jax.Array, settings: Checked) -> jax.Array:
    """Rounded labels [N, C] of similarities [N, C] and potentials [C]."""
    return rounded(soft_labels(similarity, potentials, settings.label_temperature), settings.confidence)


def log_masses(rows: Rows, text: jax.Array | None, potentials: jax.Array, label_temperature: jax.Array) -> jax.Array:
    """log of the column sums of a block's labels, for several potentials [G, C]: -> [G, C]."""
    similarity = similarity_of(rows, text)  # [N,C]

    def one(potentials: jax.Array) -> jax.Array:
        logits = similarity / label_temperature + potentials[None, :]
        log_labels = jax.nn.log_softmax(logits, axis=-1)  # [N,C]
        return jax.nn.logsumexp(log_labels, axis=0, where=rows.mask[:, None])  # [C]

    return jax.lax.map(one, potentials)  # [G,C], never [G,N,C]


def sinkhorn(task: Task, gammas: jax.Array, settings: Checked) -> jax.Array:
    """Class potentials [G, C] for each gamma [G]: columns scaled to their target, rows to one, in turn."""

    def column_log_means(potentials: jax.Array) -> jax.Array:  # [G,C]
        # [G,C] in one pass over the images for all gammas
        masses = task.reduce(log_masses, task.text, potentials, settings.label_temperature, log=True)
        return masses - jnp.log(task.num_images)

    first = column_log_means(jnp.zeros((gammas.shape[0], task.num_classes), jnp.float32))  # [G,C]
    target = jax.nn.log_softmax(gammas[:, None] * first, axis=-1)  # q_j ~ (sum_i P_ij)^gamma

    def scale(_: jax.Array, potentials: jax.Array) -> jax.Array:
        return potentials + target - column_log_means(potentials)

    # from potentials of 0 the first scaling of columns needs no further pass
    potentials = task.reduce.loops.fori_loop(1, settings.sinkhorn_iterations, scale, target - first)
    # gamma = 1 asks for the marginal that is there already: exactly plain softmax, no rounding errors
    return jnp.where(gammas[:, None] == 1, jnp.float32(0), potentials)
