"""Learned proxies on disk: what is written is read again, and nothing else is taken for proxies."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jaxzs
from jaxzs import prompt, proxy
from jaxzs.errors import DataError
from jaxzs.files import write_arrays


@pytest.fixture(scope="module")
def model():
    return jaxzs.load("demo")


@pytest.fixture
def learned(model):
    width = model.config.projection_dim
    proxies = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    settings = {"gamma": 0.0, "solver": "fast"}
    return proxy.LearnedProxies(proxies, ("one", "two", "три"), model.fingerprint, settings)


def test_round_trip_is_exact(learned, model, tmp_path):
    path = tmp_path / "folder" / "proxies.safetensors"
    proxy.save_proxies(path, learned)
    again = proxy.load_proxies(path, model)
    np.testing.assert_array_equal(again.proxies, learned.proxies)
    assert again.proxies.dtype == np.float32
    for field in dataclasses.fields(learned)[1:]:  # proxies are compared above, as == of arrays is no truth value
        assert getattr(again, field.name) == getattr(learned, field.name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_proxies_of_another_checkpoint_are_refused(learned, model, tmp_path):
    path = tmp_path / "proxies.safetensors"
    proxy.save_proxies(path, dataclasses.replace(learned, fingerprint="0123456789abcdef"))
    with pytest.raises(DataError, match=r"fitted with another checkpoint \(fingerprint 0123456789ab"):
        proxy.load_proxies(path, model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_names": ("one",)}, r"shape \(3, \d+\), expected \[C,E\] with the 1 class names"),
        ({"proxies": np.full((3, 4), np.nan)}, "not finite"),
        ({"proxies": np.ones(3)}, r"shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_not_written(learned, values, message, tmp_path):
    with pytest.raises(DataError, match=message):
        proxy.save_proxies(tmp_path / "proxies.safetensors", dataclasses.replace(learned, **values))
    assert not any(tmp_path.iterdir())


def test_files_that_hold_no_proxies(learned, model, tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(DataError, match="cannot read"):
        proxy.load_proxies(path, model)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(DataError, match="is damaged"):
        proxy.load_proxies(path, model)
    write_arrays(path, {"proxies": learned.proxies}, {})
    with pytest.raises(DataError, match="holds no proxies"):
        proxy.load_proxies(path, model)
    write_arrays(path, {"proxies": learned.proxies}, {"format": "jaxzs.proxies/1"})
    with pytest.raises(DataError, match="description of the proxies is damaged"):
        proxy.load_proxies(path, model)
    modality = prompt.TextPrompt(length=4)
    prompts = modality.init(jax.random.key(0), model.config)
    tuned = prompt.TunedPrompt(modality, prompts, ("one",), "a photo of a {}", model.fingerprint)
    prompt.save_prompt(path, tuned)
    with pytest.raises(DataError, match="holds no proxies"):
        proxy.load_proxies(path, model)
