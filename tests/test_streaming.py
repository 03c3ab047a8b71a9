"""Proxies from chunks that come from the host: the results of `proxy.fit`, whatever the chunks."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from jaxzs import features, proxy
from jaxzs.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(6, 12))
    x = centres[rng.integers(0, 6, size=301)] + 2 * rng.normal(size=(301, 12))
    return x.astype(np.float32), centres.astype(np.float32)


def chunks_of(x, *cuts):
    return lambda: np.split(x, cuts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "closed_form"},
        {"solver": "closed_form", "gamma": 0.5},
        {"solver": "fast", "iterations": 4},
        {"solver": "reference", "iterations": 10},
        {"solver": "closed_form", "gamma": "auto"},
    ],
    ids=str,
)
def test_equal_to_fit(problem, options):
    x, z = problem
    settings, key = proxy.Settings(sinkhorn_iterations=5, **options), jax.random.key(0)
    alone = proxy.fit(x, z, settings, key=key)
    streamed = proxy.fit_chunks(chunks_of(x, 40, 41, 200), z, settings, key=key)
    # Sums over chunks in another order: float32 rounding of unit vectors.
    np.testing.assert_allclose(np.asarray(streamed.proxies), np.asarray(alone.proxies), atol=1e-5)
    np.testing.assert_allclose(streamed.objective, alone.objective, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_pass_asks_for_the_chunks_again(problem):
    x, z = problem
    asked = []

    def chunks():
        asked.append(True)
        yield from np.array_split(x, 3)

    proxy.fit_chunks(chunks, z, proxy.Settings(solver="closed_form", sinkhorn_iterations=4))
    # Lengths, four scalings of columns, sums of the closed form, objective and gradient at the end.
    assert len(asked) == 1 + 4 + 1 + 1


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (list, "no images"),
        (lambda: [np.ones((3, 5), np.float32)], "E = 12"),
        (lambda: [np.full((3, 12), np.nan, np.float32)], "not finite"),
    ],
)
def test_unfit_chunks(problem, chunks, message):
    with pytest.raises(DataError, match=message):
        proxy.fit_chunks(chunks, problem[1])


def test_unfit_options(problem):
    with pytest.raises(ConfigError, match="solver"):
        proxy.fit_chunks(chunks_of(problem[0], 100), problem[1], proxy.Settings(solver="best"))


@pytest.mark.slow
def test_from_a_feature_store(tmp_path):
    """The store's own method is what `fit_chunks` takes; parts of two processes cover it."""
    from tiny_model import noise, tiny_model

    from jaxzs import data

    source = data.from_arrays(noise(40))
    store = features.extract(tiny_model(), source, tmp_path, batch_size=8, chunk_size=8)
    x = store.arrays().features
    np.testing.assert_array_equal(np.concatenate(list(store.features())), x)
    parts = [partial(store.features, part=part, parts=2) for part in range(2)]
    np.testing.assert_array_equal(np.concatenate([c for part in parts for c in part()]), x)
    settings = proxy.Settings(solver="closed_form", sinkhorn_iterations=2)
    streamed = proxy.fit_chunks(store.features, x[:4], settings)
    alone = proxy.fit(x, x[:4], settings)
    np.testing.assert_allclose(np.asarray(streamed.proxies), np.asarray(alone.proxies), atol=1e-5)
