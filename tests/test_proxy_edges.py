"""Every public function of proxy learning on inputs at the edge: a named error, or the right result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import proxy, zeroshot
from jaxzs.errors import ConfigError, DataError, JaxzsError
from jaxzs.proxy import checks

RNG = np.random.default_rng(0)
TRUTH = np.arange(60) % 4
Z = RNG.standard_normal((4, 16)).astype(np.float32)
X = Z[TRUTH] + RNG.standard_normal((60, 16)).astype(np.float32)
S = np.asarray(zeroshot.similarity(jnp.asarray(X), jnp.asarray(Z)))
LABELS = np.asarray(proxy.pseudo_labels(S))
KEY = jax.random.key(0)
FAST = {"iterations": 3}  # one program each for all of this file


def fit(x, z, mask=None, logit_scale=100.0, **options):
    return proxy.fit(x, z, proxy.Settings(**FAST | options), logit_scale=logit_scale, mask=mask).proxies


def learn(x, z, mask=None, soft_labels=LABELS, **options):
    return proxy.learn_proxies(x, z, soft_labels, mask=mask, **FAST | options).proxies


def choose(x, z, mask=None, key=KEY, **options):
    return proxy.choose_gamma(x, z, proxy.Settings(**options), mask=mask, key=key)


ON_FEATURES = {
    "fit": fit,
    "learn_proxies": learn,
    "sinkhorn_potentials": proxy.sinkhorn_potentials,
    "choose_gamma": choose,
    "fit_chunks": lambda x, z: proxy.fit_chunks(lambda: [x], z, proxy.Settings(solver="closed_form")).proxies,
}
with_mask = {name: ON_FEATURES[name] for name in list(ON_FEATURES)[:-1]}
each = pytest.mark.parametrize("function", ON_FEATURES.values(), ids=ON_FEATURES)
each_with_mask = pytest.mark.parametrize("function", with_mask.values(), ids=with_mask)


def with_row(value, x=X, row=3):
    x = x.copy()
    x[row] = value
    return x


@each
@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        (with_row(0), Z, "zeros"),
        (X * 0, Z, "zeros"),
        (with_row(1e-45), Z, "zeros"),  # nothing that float32 computes with
        (with_row(np.nan), Z, "not finite"),
        (with_row(-np.inf).astype(np.float64), Z, "not finite"),
        (X, with_row(0, Z), "text_proxies holds rows of zeros, first in row 3"),
        (X, with_row(np.nan, Z), "text_proxies holds values that are not finite"),
        (X[:, :8], Z, r"E = 16|feature sizes"),
        (X, Z[:1], "there is 1 class"),
        (X[:0], Z, "no images|it is empty"),
        (X, Z[:0], "it is empty"),
        (X[0], Z, "shape"),
        (X[None], Z, "shape"),
        ((X * 100).astype(np.int32), Z, "int32"),
        (X > 0, Z, "bool"),
        (X.astype(np.complex64), Z, "complex64"),
        (X.astype(object), Z, "object"),
        (None, Z, "shape"),
        ([[1.0, 2.0], [1.0]], Z, "is not an array"),
        (X, "text", "shape"),
    ],
    ids=str,
)
def test_features_that_nothing_can_be_learned_from(function, x, z, message):
    with pytest.raises(DataError, match=message):
        function(x, z)


@pytest.mark.slow
@each
def test_features_in_other_clothes_are_the_same_features(function):
    expected = np.asarray(function(X, Z))
    lengths = np.geomspace(1e-30, 1e30, 60)[:, None]  # of which float32 holds no square
    for x, z in (
        (X.tolist(), Z.tolist()),
        (X.astype(">f4"), Z.astype(">f8")),
        (np.repeat(X, 2, axis=1)[:, ::2], np.asfortranarray(Z)),
        (X.astype(np.float64) * 1e300, Z.astype(np.float64) * 1e-300),
        (X.astype(np.longdouble), Z),
        ((X * lengths).astype(np.float32), Z * np.float32(1e-20)),
    ):
        # lengths are rounded away: features differ by 6e-8, a hundredfold in logits, and sums of those
        np.testing.assert_allclose(function(x, z), expected, atol=2e-4)
    half = function(X.astype(np.float16), jnp.asarray(Z, jnp.bfloat16))  # three digits of the features
    assert np.isfinite(half).all()


@each_with_mask
def test_masks(function):
    used = np.arange(60) != 3
    expected = np.asarray(function(X, Z, mask=used))
    for value in (0, np.nan, np.inf, 1e38):
        np.testing.assert_array_equal(function(with_row(value), Z, mask=used), expected)
    np.testing.assert_array_equal(function(X, Z, mask=used.tolist()), expected)
    assert np.isfinite(function(X, Z, mask=np.arange(60) == 5)).all()
    for mask in (~used & used, used[1:], used[:, None], used.astype(int), "all"):
        with pytest.raises(DataError, match="mask"):
            function(X, Z, mask=mask)


@each
@pytest.mark.parametrize(
    ("x", "z"), [(X[[0] * 60], Z), (X, Z[[0, 0, 1, 2]]), (X, Z[[0] * 4]), (X, np.concatenate([Z[:2], -Z[:2]]))]
)
def test_degenerate_problems_have_finite_answers(function, x, z):
    assert np.isfinite(function(x, z)).all()


NO_TEMPERATURES = [0, -1, 1e-38, 1e-45, 1e-300, 1e38, np.nan, np.inf, "0.1", np.ones(3), [0.1], True, 1j, 10**400]
OF_TEMPERATURES = {
    "temperature": lambda t: fit(X, Z, temperature=t),
    "label_temperature": lambda t: fit(X, Z, label_temperature=t),
    "logit_scale": lambda s: fit(X, Z, logit_scale=s),
    "of learn_proxies": lambda t: learn(X, Z, temperature=t),
    "of sinkhorn_potentials": lambda t: proxy.sinkhorn_potentials(X, Z, temperature=t),
    "of pseudo_labels": lambda t: proxy.pseudo_labels(S, temperature=t),
}


@pytest.mark.parametrize("function", OF_TEMPERATURES.values(), ids=OF_TEMPERATURES)
def test_temperatures(function):
    for value in (1e-36, 1e-10, 1e-4, 1e3, 1e36):
        assert np.isfinite(function(value)).all()
    as_python = np.asarray(function(0.25))
    for value in (np.float64(0.25), np.float16(0.25), np.array(0.25), jnp.bfloat16(0.25)):
        np.testing.assert_array_equal(function(value), as_python)
    for value in NO_TEMPERATURES:
        with pytest.raises(ConfigError, match="expected one number"):
            function(value)


@pytest.mark.parametrize("solver", ["reference", "closed_form"])
def test_temperatures_of_the_other_solvers(solver):
    for value in (1e-36, 1e-4, 1e36):
        assert np.isfinite(fit(X, Z, temperature=value, solver=solver)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": -1},
        {"gamma": np.nan},
        {"gamma": None},
        {"gamma": "best"},
        {"confidence": 2},
        {"confidence": np.nan},
        {"solver": None},
        {"solver": ["fast"]},
        {"iterations": 0},
        {"iterations": 2.5},
        {"iterations": "3"},
        {"sinkhorn_iterations": 0},
        {"ridge": 0},
        {"ridge": 1e30},
        {"ridge": np.nan},
        {"tolerance": -1},
        {"tolerance": np.nan},
        {"product_dtype": int},
        {"product_dtype": "zzz"},
        {"product_dtype": None},
        {"product_dtype": np.float64},
        {"block_size": 0},
        {"block_size": -5},
        {"sharding": "data"},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        fit(X, Z, **options)


@pytest.mark.slow
def test_options_at_the_end_of_their_range():
    for options in ({"confidence": 0}, {"confidence": 1}, {"ridge": 0.01}, {"ridge": 1e6}, {"gamma": 1}):
        assert np.isfinite(fit(X, Z, **options)).all()
    one, all_at_once = (fit(X, Z, solver="closed_form", block_size=size) for size in (1, 10**9))
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)  # other orders of 60 sums
    assert np.isfinite(fit(X, Z, product_dtype="bfloat16")).all()
    with pytest.raises(ConfigError, match=r"settings is 0\.01; expected proxy\.Settings"):
        proxy.fit(X, Z, 0.01)


def test_keys():
    for key in (5, "a", np.zeros(2), jax.random.split(KEY)):
        with pytest.raises(ConfigError, match="expected a random key"):
            choose(X, Z, key=key)
    assert float(choose(X, Z, key=jax.random.PRNGKey(0))) in proxy.GAMMAS


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS * 0, "no distributions"),
        (-LABELS, "no distributions"),
        (LABELS * 100, "no distributions"),
        (LABELS * np.nan, "not finite"),
        (LABELS[:10], "numbers of rows"),
        (LABELS[:, :2], "numbers of classes"),
        (LABELS.argmax(1), "shape"),
        (LABELS.astype(int), "int64"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(DataError, match=message):
        learn(X, Z, soft_labels=labels)


def test_labels_of_one_class_and_of_other_types():
    expected = learn(X, Z)
    np.testing.assert_allclose(learn(X, Z, soft_labels=LABELS.astype(np.float64)), expected, atol=1e-6)
    assert np.isfinite(learn(X, Z, soft_labels=LABELS.astype(np.float16))).all()
    assert np.isfinite(learn(X, Z, soft_labels=np.eye(4, dtype=np.float32)[[1] * 60])).all()


@pytest.mark.parametrize(
    ("similarity", "options"),
    [
        (S * np.nan, {}),
        (S * np.float32(1e38), {}),
        (S.astype(np.float64) * 1e300, {}),
        (S[:, :1], {}),
        (S.astype(int), {}),
        (S, {"iterations": 0}),
        (S, {"gamma": None}),
        (S, {"gamma": "auto"}),
        (S, {"gamma": "auto", "key": 5, "image_features": X}),
        (S, {"gamma": "auto", "key": KEY, "image_features": X * 0}),
        (S, {"gamma": "auto", "key": KEY, "image_features": X[:9]}),
    ],
)
def test_similarities_that_give_no_labels(similarity, options):
    with pytest.raises(JaxzsError):
        proxy.pseudo_labels(similarity, **options)


@pytest.mark.slow
def test_similarities_at_the_edge():
    never = np.concatenate([S, S[:, :1] * 0 - 5], axis=1)
    for s in (S * 0, S[:1], S[:2], never, S * np.float32(1e30), S.astype(np.float16), S.astype(">f4")):
        labels = np.asarray(proxy.pseudo_labels(s))
        np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)


def test_round_labels_at_the_edge():
    assert proxy.round_labels(LABELS.astype(np.float16)).dtype == np.float16
    assert proxy.round_labels(LABELS[:1].tolist()).shape == (1, 4)
    for labels, confidence, error in (
        (LABELS * np.nan, 0.6, DataError),
        (LABELS[0], 0.6, DataError),
        (np.eye(3, dtype=int), 0.6, DataError),
        (LABELS, 2, ConfigError),
        (LABELS, None, ConfigError),
        (LABELS, np.nan, ConfigError),
        (LABELS, [0.6], ConfigError),
    ):
        with pytest.raises(error):
            proxy.round_labels(labels, confidence)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, jnp.float32])
def test_the_bounds_of_a_range_belong_to_it_in_every_type(kind):
    for bound in (1e-37, 1e37):
        assert checks.scale(kind(bound), "logit_scale") == np.float32(bound)
    for value in (9e-38, 1.1e37, np.nan, 1e300):
        with pytest.raises(ConfigError, match="from 1e-37 to 1e\\+37"):
            checks.scale(value, "logit_scale")
