"""Accuracies against scikit-learn and against counting by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import metrics
from jaxzs.errors import ConfigError, DataError


@pytest.fixture
def case() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(200, 7)), jnp.float32)
    return scores, jnp.asarray(rng.integers(0, 7, 200)), jnp.asarray(rng.random(200) < 0.7)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_agrees_with_scikit_learn(case, k):
    from sklearn.metrics import top_k_accuracy_score

    scores, labels, mask = case
    keep = np.asarray(mask)
    if k == 7:
        expected = 1.0  # scikit-learn warns there
    else:
        expected = top_k_accuracy_score(np.asarray(labels)[keep], np.asarray(scores)[keep], k=k, labels=np.arange(7))
    result = jax.jit(metrics.top_k_accuracy, static_argnums=2)(scores, labels, k, mask)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_top_1_is_the_accuracy_of_argmax_also_with_ties(case):
    scores, labels, mask = case
    scores = jnp.round(scores)
    top_1 = metrics.top_k_accuracy(scores, labels, 1, mask)
    assert float(top_1) == float(metrics.accuracy(scores.argmax(-1), labels, mask))


def test_per_class_counts_and_absent_classes(case):
    scores, labels, mask = case
    predictions = scores.argmax(-1)
    per_class, counts = metrics.per_class_accuracy(predictions, labels, 8, mask)
    p, y = np.asarray(predictions)[mask], np.asarray(labels)[mask]
    expected = [(p[y == c] == c).mean() for c in range(7)]
    np.testing.assert_allclose(per_class[:7], expected, rtol=1e-6)
    assert np.isnan(per_class[7])
    assert counts.tolist() == [*np.bincount(y, minlength=7), 0]
    mean = metrics.mean_per_class_accuracy(predictions, labels, 8, mask)
    np.testing.assert_allclose(mean, np.mean(expected), rtol=1e-6)


def test_nothing_counts():
    none = jnp.zeros((3,), bool)
    assert float(metrics.accuracy(jnp.zeros(3, int), jnp.zeros(3, int), none)) == 0


def test_errors_name_what_is_wrong(case):
    scores, labels, _ = case
    with pytest.raises(DataError, match="labels has shape"):
        metrics.top_k_accuracy(scores, labels[:5])
    with pytest.raises(DataError, match="mask has shape"):
        metrics.accuracy(labels, labels, jnp.ones(3, bool))
    with pytest.raises(ConfigError, match="k is 9"):
        metrics.top_k_accuracy(scores, labels, 9)


def test_confusion_matrix_counts_what_is_not_masked():
    predictions, labels = jnp.array([0, 1, 2, 2, 1]), jnp.array([0, 0, 2, 1, 1])
    counts = metrics.confusion_matrix(predictions, labels, 3, jnp.array([True, True, True, True, False]))
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert jax.jit(metrics.confusion_matrix, static_argnums=2)(predictions, labels, 3).sum() == 5
    with pytest.raises(DataError, match="labels has shape"):
        metrics.confusion_matrix(predictions, labels[:3], 3)
