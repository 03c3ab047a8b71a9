"""Pseudo labels: the reference's values, a float64 transcription, properties, masks, devices."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax, logsumexp

from jaxzs import proxy
from jaxzs.errors import ConfigError, DataError
from jaxzs.proxy.gamma import parts_of, random_splits
from jaxzs.proxy.labels import _pseudo_labels, _sinkhorn_potentials
from jaxzs.proxy.rows import Rows
from jaxzs.proxy.settings import for_rows, in_float32
from jaxzs.proxy.sinkhorn import largest_of_row


def plain_sinkhorn(similarity, temperature, gamma, iterations=20):
    """The method's description, word by word, in float64."""
    p = np.exp(log_softmax(np.asarray(similarity, np.float64) / temperature, axis=1)) / len(similarity)
    q = p.sum(0) ** gamma
    q = q / q.sum() if gamma else np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(iterations):
        p = p * (q / p.sum(0))
        p = p / p.sum(1, keepdims=True) / len(p)
    return p * len(p)


def log_sinkhorn(similarity, temperature, gamma, iterations=20):
    """The same in the log domain, float64: also right where the plain scheme underflows."""
    log_p = log_softmax(np.asarray(similarity, np.float64) / temperature, axis=1)
    log_q = log_softmax(gamma * logsumexp(log_p, axis=0))
    for _ in range(iterations):
        log_p = log_p + log_q - logsumexp(log_p, axis=0) + np.log(len(log_p))
        log_p = log_softmax(log_p, axis=1)
    return np.exp(log_p)


def similarities(seed=0, n=60, c=5):
    rng = np.random.default_rng(seed)
    return np.float32(0.25 + 0.03 * rng.normal(size=(n, c)))


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_reference_labels(golden, case):
    reference = np.load(golden / "inmap" / f"{case}.npz")
    tau = float(reference["tau_t"])
    # logits are up to 1 / tau = 50, so float32 leaves 50 * 6e-8 relative error in a label; 20 sweeps add some
    plain = proxy.pseudo_labels(reference["logits"], temperature=tau, gamma=1.0)
    np.testing.assert_allclose(plain, reference["softmax_labels"], atol=3e-6)
    for name in [k for k in reference if k.startswith("sinkhorn_labels")]:
        gamma = float(name.removeprefix("sinkhorn_labels_gamma"))
        labels = proxy.pseudo_labels(reference["logits"], temperature=tau, gamma=gamma)
        np.testing.assert_allclose(labels, reference[name], atol=3e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_float64_transcription(gamma):
    s = similarities()
    labels = proxy.pseudo_labels(s, gamma=gamma)
    np.testing.assert_allclose(labels, plain_sinkhorn(s, 0.01, gamma), atol=1e-5)
    np.testing.assert_allclose(labels, log_sinkhorn(s, 0.01, gamma), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_class_that_nobody_predicts_where_the_plain_scheme_underflows(gamma):
    s = similarities()
    s[:, 2] -= 2.0  # exp(-200) is 0 in float32
    assert np.exp(np.float32(-200.0)) == 0
    labels = np.asarray(proxy.pseudo_labels(s, gamma=gamma))
    # potentials of about 200 round to 1.5e-5
    np.testing.assert_allclose(labels, log_sinkhorn(s, 0.01, gamma), atol=2e-4)
    if gamma == 0:
        np.testing.assert_allclose(labels[:, 2].sum(), len(s) / 5, rtol=0.02)


def test_gamma_one_is_exactly_softmax():
    s = similarities()
    x, z = features()
    np.testing.assert_array_equal(proxy.sinkhorn_potentials(x, z, gamma=1.0), 0)
    # another program may round s / tau differently: logits up to 35, so 35 x 6e-8 in each, and twice that in a label
    expected = jax.nn.softmax(s / np.float32(0.01), axis=-1)
    np.testing.assert_allclose(proxy.pseudo_labels(s, gamma=1.0), expected, rtol=5e-6)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.0, 0.25, 0.7, 1.0]),
    temperature=st.sampled_from([0.005, 0.01, 0.05]),
)
def test_rows_are_distributions_and_columns_reach_their_target(seed, gamma, temperature):
    s = similarities(seed)
    labels = np.asarray(proxy.pseudo_labels(s, gamma=gamma, temperature=temperature, iterations=400), np.float64)
    assert labels.min() >= 0
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
    q = log_sinkhorn(s, temperature, 1.0).mean(0) ** gamma
    # the last scaling is of rows, so columns are as near as 400 iterations bring them
    np.testing.assert_allclose(labels.mean(0), q / q.sum(), atol=2e-3)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), shift=st.floats(-0.5, 0.5))
def test_order_of_classes_and_rows_and_a_common_shift_do_not_matter(seed, shift):
    s = similarities(seed)
    rng = np.random.default_rng(seed)
    classes, rows = rng.permutation(s.shape[1]), rng.permutation(len(s))
    labels = proxy.pseudo_labels(s)
    moved = proxy.pseudo_labels(s[rows][:, classes] + np.float32(shift))
    # s + shift rounds to 6e-8, a hundredfold in the logits
    np.testing.assert_allclose(moved, labels[rows][:, classes], atol=5e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def features(n=64, e=16, c=5, seed=0):
    rng = np.random.default_rng(seed)
    text = unit(rng.normal(size=(c, e)) + 2).astype(np.float32)
    x = text[rng.integers(0, c, n)] + 0.3 * rng.normal(size=(n, e)) / np.sqrt(e)
    return unit(x).astype(np.float32), text


@pytest.mark.parametrize("block_size", [None, 10, 64])
def test_potentials_give_the_labels_whatever_the_blocks_and_the_scale_of_features(block_size):
    x, z = features()
    labels = proxy.pseudo_labels(x @ z.T, gamma=0.2)
    settings = in_float32(proxy.Settings(gamma=0.2, block_size=block_size))
    rows, text = Rows(jnp.ones(len(x), bool), features=jnp.asarray(7 * x)), jnp.asarray(0.1 * z)
    v = _sinkhorn_potentials(rows, text, for_rows(settings, rows, len(z)))
    assert v.shape == (5,)
    from_v = jax.nn.softmax(x @ z.T / np.float32(0.01) + v[None, :], axis=-1)
    np.testing.assert_allclose(from_v, labels, atol=2e-5)  # similarities round differently


def test_padding_counts_for_nothing_even_if_it_is_not_a_number():
    x, z = features()
    s = x @ z.T
    mask = np.arange(80) < 64
    padded = np.concatenate([s, np.full((16, 5), np.nan, np.float32)])
    labels = proxy.pseudo_labels(padded, mask=mask)
    np.testing.assert_allclose(labels[:64], proxy.pseudo_labels(s), atol=2e-6)
    np.testing.assert_array_equal(labels[64:], 0)
    padded_x = np.concatenate([x, np.full((16, 16), np.nan, np.float32)])
    v = proxy.sinkhorn_potentials(padded_x, z, mask=mask)
    np.testing.assert_allclose(v, proxy.sinkhorn_potentials(x, z), atol=1e-4)  # of values around 10


def test_jit_vmap_and_a_single_trace():
    s = similarities()
    gammas, taus = jnp.array([0.0, 0.5, 1.0]), jnp.array([0.01, 0.02, 0.05])

    @jax.jit
    @jax.vmap
    def sweep(gamma, tau):
        return proxy.pseudo_labels(s, gamma=gamma, temperature=tau)

    for labels, gamma, tau in zip(sweep(gammas, taus), gammas, taus, strict=True):
        np.testing.assert_allclose(labels, proxy.pseudo_labels(s, gamma=gamma, temperature=tau), atol=1e-6)

    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(_pseudo_labels.__wrapped__, n=1))
    for gamma in (0.0, 0.5):
        counted(Rows(jnp.ones(60, bool), similarity=jnp.asarray(s)), in_float32(proxy.Settings(gamma=gamma)))


def test_sharded_rows(data_mesh):
    x, z = features()
    s = x @ z.T
    sharded = jax.device_put(s, NamedSharding(data_mesh, P("data")))
    np.testing.assert_allclose(proxy.pseudo_labels(sharded), proxy.pseudo_labels(s), atol=2e-6)


def test_rounding_is_strictly_above_and_ties_go_to_the_first():
    labels = jnp.array([[0.6, 0.4], [0.61, 0.39], [0.5, 0.5], [0.1, 0.9]], jnp.float32)
    rounded = proxy.round_labels(labels, 0.6)
    np.testing.assert_array_equal(rounded, jnp.array([[0.6, 0.4], [1, 0], [0.5, 0.5], [0, 1]]))
    np.testing.assert_array_equal(proxy.round_labels(labels, 1.0), labels)


def chosen_gamma(x, s):
    """The gamma whose labels gamma="auto" returns."""
    options = {"temperature": 0.05, "image_features": x}
    auto = proxy.pseudo_labels(s, gamma="auto", key=jax.random.key(0), **options)
    return [g for g in proxy.GAMMAS if np.array_equal(proxy.pseudo_labels(s, gamma=g, **options), auto)]


@pytest.mark.slow
def test_auto_gamma_returns_the_labels_of_one_candidate_and_sees_unequal_classes():
    rng = np.random.default_rng(1)
    text = unit(rng.normal(size=(4, 16))).astype(np.float32)
    truth = np.repeat(np.arange(4), [300, 60, 20, 4])
    x = unit(text[truth] + 0.15 * rng.normal(size=(384, 16))).astype(np.float32)
    (gamma,) = chosen_gamma(x, x @ text.T)
    assert gamma >= 0.5  # a uniform marginal would give the class of 4 images 96


@pytest.mark.slow
def test_the_choice_of_gamma_does_not_hang_on_the_key():
    x, z = features()
    settings = proxy.Settings(label_temperature=0.05, temperature=0.2)
    chosen = [float(proxy.choose_gamma(x, z, settings, key=key)) for key in (None, *map(jax.random.key, range(4)))]
    assert len(set(chosen)) == 1
    assert random_splits(None, 64).shape == (64, 8)
    assert random_splits(jax.random.key(1), 30_000).shape == (30_000, 2)  # halves of many images differ little
    splits = np.asarray(random_splits(None, 64))
    assert len({column.tobytes() for column in splits.T}) == 8


def test_errors_name_what_is_wrong():
    s = similarities()
    x, z = features()
    bad = s.copy()
    bad[3, 1] = np.inf
    for error, message, call in [
        (DataError, r"shape \(5,\)", lambda: proxy.pseudo_labels(s[0])),
        (DataError, "it is empty", lambda: proxy.pseudo_labels(s[:0])),
        (DataError, "dtype int64", lambda: proxy.pseudo_labels(np.ones((3, 2), int))),
        (DataError, "there is 1 class", lambda: proxy.pseudo_labels(s[:, :1])),
        (DataError, "not finite, first in row 3", lambda: proxy.pseudo_labels(bad)),
        (DataError, "mask leaves no row", lambda: proxy.pseudo_labels(s, mask=np.zeros(60, bool))),
        (DataError, "mask has shape", lambda: proxy.pseudo_labels(s, mask=np.ones(4, bool))),
        (DataError, "mask has dtype", lambda: proxy.pseudo_labels(s, mask=np.ones(60))),
        (ConfigError, "gamma is 1.5", lambda: proxy.pseudo_labels(s, gamma=1.5)),
        (ConfigError, "gamma is nan", lambda: proxy.pseudo_labels(s, gamma=np.nan)),
        (ConfigError, "gamma is 'best'", lambda: proxy.pseudo_labels(s, gamma="best")),
        (ConfigError, "image_features", lambda: proxy.pseudo_labels(s, gamma="auto")),
        (ConfigError, "temperature is 0", lambda: proxy.pseudo_labels(s, temperature=0)),
        (ConfigError, "iterations is 0", lambda: proxy.pseudo_labels(s, iterations=0)),
        (DataError, "feature sizes", lambda: proxy.sinkhorn_potentials(x, z[:, :4])),
        (ConfigError, "block_size is 0", lambda: proxy.Settings(block_size=0)),
    ]:
        with pytest.raises(error, match=message):
            call()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_parts_of_a_split_hold_every_row_once(num_rows, seed):
    fold = np.random.default_rng(seed).random(num_rows) < 0.5
    parts = parts_of(jnp.asarray(fold))
    index, mask, half = map(np.asarray, parts)
    assert sorted(index[mask]) == list(range(num_rows))
    assert all((fold[rows[there]] == which).all() for rows, there, which in zip(index, mask, half, strict=True))


def test_the_first_of_the_largest_is_what_argmax_says():
    x = np.random.default_rng(0).integers(0, 3, size=(50, 4)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(np.asarray(largest_of_row(jnp.asarray(x))), np.eye(4, dtype=bool)[x.argmax(1)])
