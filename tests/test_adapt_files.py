"""Heads on disk, and proxies that earlier versions kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxzs
from jaxzs import adapt, proxy
from jaxzs.errors import DataError
from jaxzs.files import write_arrays

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def model():
    return jaxzs.load("demo")


def features(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("fit", [adapt.anchored_gda, adapt.stata])
def test_a_head_comes_back_and_scores_the_same(tmp_path, model, fit):
    x = features(0, 40)
    head = fit(x, features(1, 3))
    adapt.save_head(tmp_path / "head.safetensors", adapt.KeptHead(head, NAMES, model.fingerprint, {"method": "x"}))
    kept = adapt.load_head(tmp_path / "head.safetensors", model)
    assert kept.class_names == NAMES
    assert kept.settings == {"method": "x"}
    assert type(kept.head) is type(head)
    assert np.array_equal(adapt.scores(kept.head, x), adapt.scores(head, x))


def test_proxies_of_before_are_read_as_a_head(tmp_path, model):
    x, proxies = features(0, 10), features(1, 3)
    path = tmp_path / "proxies.safetensors"
    proxy.save_proxies(path, proxy.LearnedProxies(proxies, NAMES, model.fingerprint))
    kept = adapt.load_head(path, model)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    expected = unit(x) @ unit(proxies).T * model.logit_scale / 4
    np.testing.assert_allclose(adapt.scores(kept.head, x), expected, rtol=0, atol=1e-4)  # of scores of 25


def test_errors_name_the_file_and_what_is_wrong(tmp_path, model):
    path = tmp_path / "head.safetensors"
    head = adapt.text_head(features(1, 3))
    for bad, message in [
        (head._replace(bias=jnp.zeros(2)), "expected \\[C,E\\] and \\[C\\]"),
        (head._replace(weights=head.weights * jnp.nan), "not finite"),
        (adapt.text_head(features(1, 4)), "for 3 class names"),
    ]:
        with pytest.raises(DataError, match=message):
            adapt.save_head(path, adapt.KeptHead(bad, NAMES, model.fingerprint))
    assert not path.exists()
    adapt.save_head(path, adapt.KeptHead(head, NAMES, "of another model"))
    with pytest.raises(DataError, match="another checkpoint"):
        adapt.load_head(path, model)
    write_arrays(path, {"weights": np.zeros((3, 4), np.float32)}, {"format": "something"})
    with pytest.raises(DataError, match="holds no head"):
        adapt.load_head(path, model)
    write_arrays(path, {"weights": np.zeros((3, 4), np.float32)}, {"format": "jaxzs.head/1", "class_names": NAMES})
    with pytest.raises(DataError, match="holds no head"):
        adapt.load_head(path, model)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a safetensors file"):
        adapt.load_head(path, model)
