"""The rule, `adapt.fit` by every method, and calibrated scores."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapt_methods import inputs, stored

from jaxzs import adapt, parallel, proxy
from jaxzs.errors import ConfigError, DataError

SPREAD = 0.05  # temperature at which the synthetic text is in doubt


def assert_same_head(found, expected):
    # sums of float32 in another order, through a solve and five rounds
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


@functools.cache
def fitted() -> adapt.Adapted:
    x, z, _ = inputs()
    return adapt.fit(x, z, temperature=SPREAD)


def test_the_rule_is_its_two_methods():
    x, z, _ = inputs()
    choice = adapt.choose(x, z, temperature=SPREAD)
    assert float(choice.gamma) in proxy.GAMMAS
    assert int(choice.votes.sum()) == 8
    found = fitted()
    assert float(found.choice.gamma) == float(choice.gamma)
    if choice.method == "gda":
        head = adapt.anchored_gda(x, z, temperature=SPREAD)
    else:
        settings = proxy.Settings(gamma=choice.gamma, solver="closed_form")
        head = adapt.text_head(proxy.fit(x, z, settings, logit_scale=1 / SPREAD).proxies, temperature=4 * SPREAD)
    assert_same_head(found.head, jax.tree.map(lambda leaf: leaf * found.scale, head))
    assert choice.reason


@pytest.mark.slow
def test_both_sides_of_the_rule_are_taken():
    uniform = adapt.choose(jnp.tile(jnp.eye(4), (8, 1)), jnp.eye(4))
    assert (uniform.method, float(uniform.gamma)) == ("closed_form", 0.0)
    g = stored("synthetic_open")
    x, z = g["image_features"], g["text_proxies"]
    few = adapt.choose(x[: 2 * len(z) - 1], z)
    assert (few.method, int(few.votes.sum())) == ("gda", 0)
    assert few.reason.startswith("fewer than two images a class")


@pytest.mark.slow
def test_the_choice_is_the_same_padded_jitted_and_from_chunks():
    x, z, _ = inputs()
    expected = fitted()
    padded = np.concatenate([x, np.full((8, x.shape[1]), 1e6, np.float32)])
    assert_same_head(adapt.fit(padded, z, temperature=SPREAD, mask=np.arange(len(padded)) < len(x)), expected)
    assert_same_head(jax.jit(lambda t: adapt.fit(x, z, temperature=t))(SPREAD), expected)
    sweep = jax.vmap(lambda t: adapt.fit(3 * x, z / 7, temperature=t))(jnp.array([SPREAD, 0.01]))
    assert_same_head(jax.tree.map(lambda leaf: leaf[0], sweep), expected)
    assert_same_head(adapt.fit(lambda: iter([x[:50], x[50:]]), z, temperature=SPREAD), expected)


@pytest.mark.slow  # on a loaded machine of two cores eight host devices have waited for each other without end
def test_the_choice_is_the_same_sharded():
    x, z, _ = inputs()
    rows, mask = parallel.shard_rows(x, parallel.make_mesh())
    assert_same_head(adapt.fit(rows, z, temperature=SPREAD, mask=mask), fitted())


def test_equal_labels_are_no_choice_of_rounding():
    """All labels are sure, and the same for every balance: losses are equal to the bit, and the first balance wins."""
    drawn = np.random.default_rng(0).normal(size=(66, 12)).astype(np.float32)
    z = drawn[:5] / np.linalg.norm(drawn[:5], axis=1, keepdims=True)
    choice = adapt.choose(z[np.arange(61) % 5] + 0.3 * drawn[5:], z)
    assert choice.votes.tolist() == [8, 0, 0, 0, 0]


def test_the_default_does_not_hang_on_a_seed():
    x, z, _ = inputs()
    first, again = adapt.choose(x, z), adapt.choose(x, z)
    assert np.array_equal(first.votes, again.votes)
    with_key = adapt.choose(x, z, key=jax.random.key(7))
    assert int(with_key.votes.sum()) == int(first.votes.sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["proxy", "closed_form", "gda", "stata", "transclip", "zero-shot"])
def test_every_method_gives_a_head_as_sure_as_the_text(method):
    x, z, _ = inputs()
    found = adapt.fit(x, z, method=method, temperature=SPREAD)
    assert found.choice is None
    sure = lambda head: float(jax.nn.softmax(adapt.scores(head, x)).max(-1).mean())  # noqa: E731
    # bisection to 2e-6 of a factor, and float32 means of 96 numbers
    assert abs(sure(found.head) - sure(adapt.text_head(z, temperature=SPREAD))) < 1e-4


@pytest.mark.parametrize("method", ["gda", "proxy", "transclip"])
def test_temperatures_as_small_and_as_large_as_allowed_give_probabilities(method):
    """Scores of 1e36, of which a compiler's fused product differs from the rounded one by more than exp can take."""
    x, z, _ = inputs()
    for temperature in (1e-37, 1e-15, 2.5e36):
        found = adapt.fit(x, z, method=method, temperature=temperature)
        assert np.isfinite(adapt.probabilities(found, x)).all(), temperature
    for temperature in (9e-38, 1e37):  # that of vision proxies is four times as much
        with pytest.raises(ConfigError, match=r"from 1e-37 to 2\.5e\+36"):
            adapt.fit(x, z, method=method, temperature=temperature)


@pytest.mark.slow
def test_shots_make_it_discriminant_analysis_with_them():
    x, z, _ = inputs()
    shots = adapt.Shots(x[:12], stored("synthetic")["labels"][:12])
    found = adapt.fit(x[12:], z, temperature=SPREAD, shots=shots)
    head = adapt.anchored_gda(x[12:], z, temperature=SPREAD, shots=shots)
    assert_same_head(found.head, jax.tree.map(lambda leaf: leaf * found.scale, head))


@pytest.mark.slow
def test_calibration_is_the_same_jitted_vmapped_padded_sharded_and_scaled():
    x, z, _ = inputs()
    head = adapt.text_head(z, temperature=SPREAD)
    expected = adapt.calibrate(head, x, 0.5)
    sure = np.asarray(jax.nn.softmax(adapt.scores(expected, x))).max(-1)
    np.testing.assert_allclose(sure.mean(), 0.5, atol=1e-4)  # bisection to 2e-6 of a factor
    assert_same_head(jax.jit(adapt.calibrate)(head, x, 0.5), expected)
    sweep = jax.vmap(lambda confidence: adapt.calibrate(head, x, confidence))(jnp.array([0.5, 0.9]))
    assert_same_head(jax.tree.map(lambda leaf: leaf[0], sweep), expected)
    assert np.abs(sweep.weights[1] - sweep.weights[0]).max() > 1e-3
    padded = np.concatenate([x, np.full((8, x.shape[1]), np.nan, np.float32)])
    assert_same_head(adapt.calibrate(head, padded, 0.5, mask=np.arange(len(padded)) < len(x)), expected)
    rows, mask = parallel.shard_rows(x, parallel.make_mesh())
    assert_same_head(adapt.calibrate(head, rows, 0.5, mask=mask), expected)
    assert_same_head(adapt.calibrate(head, 3 * x, 0.5), expected)
    assert_same_head(adapt.calibrate(head, lambda: iter([x[:50], x[50:]]), 0.5), expected)


def test_calibration_error_is_that_of_bins():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 0])
    # bin of 0.9: half right; bin of 0.6: half right
    assert adapt.expected_calibration_error(p, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert len(adapt.reliability(p, labels)) == 2


def test_errors_name_what_is_wrong():
    x, z, _ = inputs()
    shots = adapt.Shots(x[:2], np.array([0, 1]))
    for error, message, call in [
        (ConfigError, "method is 'best'", lambda: adapt.fit(x, z, method="best")),
        (ConfigError, "takes no shots", lambda: adapt.fit(x, z, method="stata", shots=shots)),
        (ConfigError, "temperature is -1", lambda: adapt.choose(x, z, temperature=-1)),
        (ConfigError, "in memory", lambda: adapt.fit(lambda: iter([x]), z, method="transclip")),
        (ConfigError, "key is 3", lambda: adapt.choose(x, z, key=3)),
        (ConfigError, "confidence is 2", lambda: adapt.calibrate(adapt.text_head(z), x, 2)),
        (DataError, "must be", lambda: adapt.reliability(x, np.zeros(3, int))),
    ]:
        with pytest.raises(error, match=message):
            call()
