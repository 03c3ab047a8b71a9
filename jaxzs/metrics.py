"""Accuracy of predictions, as pure functions; rows with mask False count for nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzs.errors import ConfigError, DataError


def _weights(labels: jax.Array, num_rows: int, mask: jax.Array | None) -> jax.Array:
    for name, x in (("labels", labels), ("mask", mask)):
        if x is not None and x.shape != (num_rows,):
            raise DataError(f"{name} has shape {x.shape}; expected one entry per row: ({num_rows},)")
    return jnp.ones((num_rows,), jnp.float32) if mask is None else mask.astype(jnp.float32)


def _hits(scores: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether fewer than k classes come before the label, ties going to the lower class: [N] bool."""
    own = jnp.take_along_axis(scores, labels[:, None].astype(jnp.int32), axis=-1)  # [N,1]
    classes = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]  # [1,C]
    before = (scores > own) | ((scores == own) & (classes < labels[:, None].astype(jnp.int32)))  # [N,C]
    return jnp.sum(before, axis=-1) < k


def top_k_accuracy(scores: jax.Array, labels: jax.Array, k: int = 1, mask: jax.Array | None = None) -> jax.Array:
    """Fraction of rows whose label is among the k highest scores.

    scores [N,C] float, labels [N] int in [0, C), mask [N] bool. Ties go to the lower class, as in argmax.
    Returns [] float32 in [0, 1], 0 if no row counts. Raises DataError (shapes), ConfigError (k).

    >>> scores = jnp.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.1]])
    >>> [float(metrics.top_k_accuracy(scores, jnp.array([2, 1]), k)) for k in (1, 2)]
    [0.5, 1.0]
    """
    if scores.ndim != 2:
        raise DataError(f"scores has shape {scores.shape}; expected two axes [N,C]")
    if not 1 <= k <= scores.shape[1]:
        raise ConfigError(f"k is {k}; expected 1 to the number of classes, {scores.shape[1]}")
    weights = _weights(labels, scores.shape[0], mask)
    hits = jnp.sum(jnp.where(_hits(scores, labels, k), weights, 0))
    return hits / jnp.maximum(jnp.sum(weights), 1)  # with every row masked 0, not NaN


def accuracy(predictions: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Fraction of rows whose predicted class is the label.

    predictions [N] int, labels [N] int, mask [N] bool. Returns [] float32 in [0, 1], 0 if no row counts.
    Raises DataError (shapes).

    >>> predictions, labels = jnp.array([0, 1, 1]), jnp.array([0, 1, 0])
    >>> float(metrics.accuracy(predictions, labels, mask=jnp.array([True, True, False])))
    1.0
    """
    if predictions.ndim != 1:
        raise DataError(f"predictions has shape {predictions.shape}; expected one axis [N]")
    weights = _weights(labels, predictions.shape[0], mask)
    hits = jnp.sum(jnp.where(predictions == labels.astype(predictions.dtype), weights, 0))
    return hits / jnp.maximum(jnp.sum(weights), 1)


def per_class_accuracy(
    predictions: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Accuracy among the rows of each class, and how many rows that is.

    predictions [N] int, labels [N] int in [0, num_classes), mask [N] bool. Returns accuracies [C] float32,
    NaN for a class without rows, and counts [C] int32. Raises DataError (shapes).

    >>> per_class, counts = metrics.per_class_accuracy(jnp.array([0, 1, 1]), jnp.array([0, 1, 0]), 2)
    >>> per_class.tolist(), counts.tolist()
    ([0.5, 1.0], [2, 1])
    """
    if predictions.ndim != 1:
        raise DataError(f"predictions has shape {predictions.shape}; expected one axis [N]")
    weights = _weights(labels, predictions.shape[0], mask)
    hit = jnp.where(predictions == labels.astype(predictions.dtype), weights, 0)
    counts = jnp.zeros((num_classes,), jnp.float32).at[labels].add(weights)  # [C]
    hits = jnp.zeros((num_classes,), jnp.float32).at[labels].add(hit)  # [C]
    absent = counts == 0
    # NaN and not 0: nothing was asked of a class without rows.
    per_class = jnp.where(absent, jnp.float32(jnp.nan), hits / jnp.where(absent, 1, counts))
    return per_class, counts.astype(jnp.int32)


def confusion_matrix(
    predictions: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array | None = None
) -> jax.Array:
    """How many rows of each class were taken for each class: [C,C] int32, true classes down, predicted ones across.

    predictions [N] int, labels [N] int in [0, num_classes), mask [N] bool. Raises DataError (shapes).

    >>> metrics.confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 1, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    if predictions.ndim != 1:
        raise DataError(f"predictions has shape {predictions.shape}; expected one axis [N]")
    weights = _weights(labels, predictions.shape[0], mask).astype(jnp.int32)
    return jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predictions].add(weights)


def mean_per_class_accuracy(
    predictions: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array | None = None
) -> jax.Array:
    """Mean of the accuracies of the classes that have rows: [] float32. Arguments as `per_class_accuracy`.

    >>> float(metrics.mean_per_class_accuracy(jnp.array([0, 1, 1]), jnp.array([0, 1, 0]), 2))
    0.75
    """
    per_class, counts = per_class_accuracy(predictions, labels, num_classes, mask)
    present = counts > 0
    total = jnp.sum(jnp.where(present, per_class, jnp.float32(0)))  # their NaN must not enter the sum
    return total / jnp.maximum(jnp.sum(present, dtype=jnp.float32), 1)
